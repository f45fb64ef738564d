"""Commands that measure what was lost: `evaluate` runs models, `stability` compares the logs of earlier runs."""

from pathlib import Path
from typing import Annotated

import typer

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal

_TEXT, _TASKS, _WRITING, _SPEED = "Perplexity and divergence", "Tasks and stability", "Generation", "Speed"


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models to measure.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Results file to write.")] = Path("results.json"),
    against: Annotated[str | None, typer.Option("--against", help="The original to compare with.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option("--perplexity", help="Text; may be repeated.", rich_help_panel=_TEXT)
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens in a window of perplexity.", rich_help_panel=_TEXT)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Tokens between window starts; else no overlap.", rich_help_panel=_TEXT),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Tokens of each text at most.", rich_help_panel=_TEXT)
    ] = None,
    divergence: Annotated[
        bool | None,
        typer.Option("--divergence/--no-divergence", help="KL from the original; on.", rich_help_panel=_TEXT),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Multiple-choice file, `continuation:TEXT`, or an lm-eval name; may be repeated.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option("--scorer", help="Of multiple-choice files: light (ours) or lm-eval.", rich_help_panel=_TASKS),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Items of each task at most.", rich_help_panel=_TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", help="Worked examples; 0: as a task of lm-eval says.", rich_help_panel=_TASKS),
    ] = None,
    sigma: Annotated[
        list[str] | None,
        typer.Option("--sigma", help="Stability by the spread of nll or ppl; both.", rich_help_panel=_TASKS),
    ] = None,
    bootstrap: Annotated[
        int | None,
        typer.Option("--bootstrap", help="Samples of the intervals; 0: none.", rich_help_panel=_TASKS),
    ] = None,
    generation: Annotated[
        bool | None,
        typer.Option("--generation/--no-generation", help="Let the models write; on.", rich_help_panel=_WRITING),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="To continue, instead of ours; may be repeated.", rich_help_panel=_WRITING),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Written for each prompt.", rich_help_panel=_WRITING)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Sampled texts beside the greedy one.", rich_help_panel=_WRITING),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of sampled texts.", rich_help_panel=_WRITING)
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Of sampled texts.", rich_help_panel=_WRITING)] = None,
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Exit code 1 when the generation check fails.", rich_help_panel=_WRITING),
    ] = False,
    speed: Annotated[
        bool | None,
        typer.Option("--speed/--no-speed", help="Measure prefill and decode in turns; on.", rich_help_panel=_SPEED),
    ] = None,
    speed_batch_size: Annotated[
        int | None, typer.Option("--speed-batch-size", help="Sequences at once.", rich_help_panel=_SPEED)
    ] = None,
    speed_prompt_tokens: Annotated[
        int | None, typer.Option("--speed-prompt-tokens", help="Length of the prompt.", rich_help_panel=_SPEED)
    ] = None,
    speed_new_tokens: Annotated[
        int | None, typer.Option("--speed-new-tokens", help="Decode steps.", rich_help_panel=_SPEED)
    ] = None,
    speed_rounds: Annotated[
        int | None, typer.Option("--speed-rounds", help="Turns; their median counts.", rich_help_panel=_SPEED)
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Sequences run at once.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", help="Tokens run at once, without --batch-size.")
    ] = None,
    seed: o.SeedOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    max_memory: o.MaxMemoryOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Measure perplexity, tasks, stability, generation, speed and size of models, alone or against an original."""
    options = locals()
    from llm_streamline.evaluation.config import EvaluationConfig
    from llm_streamline.schema import parse

    given = {name: options[name] for name in EvaluationConfig.model_fields if options[name] not in (None, [])}
    config = parse(EvaluationConfig, given, "options")
    from llm_streamline.pipeline import evaluate as run

    place = {"dtype": dtype or "auto", "device": device or "auto", "max_memory": max_memory}
    results = run(models, config, against=against, out=out, **place)
    if as_json:
        terminal.print_json(results.model_dump(mode="json"))
    else:
        terminal.show_results(results)
        print(f"results: {out}")
    terminal.stop_at_gate(results)


def stability(
    original: Annotated[Path, typer.Argument(help="Per-item logs of the original: file or folder.")],
    model: Annotated[Path, typer.Argument(help="Per-item logs of the other model.")],
    metric: Annotated[str, typer.Option("--metric", help="acc or acc_norm, the rule that chooses answers.")] = "acc",
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    as_json: o.JsonOption = False,
) -> None:
    """Stability of answers between two models, from their logs: ours, lm-eval's --log_samples, or OpenCompass's."""
    from llm_streamline.evaluation.stability import stability as run

    comparison = run(original, model, metric=metric, seed=seed)
    if as_json:
        terminal.print_json(comparison.model_dump(mode="json"))
        return
    from llm_streamline.report.tables import stability_table

    terminal.console().print(stability_table(comparison))
