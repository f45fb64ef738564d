"""Commands that measure what was lost: `evaluate` runs models, `stability` compares the logs of earlier runs."""

from pathlib import Path
from typing import Annotated

import typer

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models to measure.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Results file to write.")] = Path("results.json"),
    against: Annotated[str | None, typer.Option("--against", help="The original to compare with.")] = None,
    perplexity: Annotated[list[str] | None, typer.Option("--perplexity", help="Text; may be repeated.")] = None,
    context: Annotated[int | None, typer.Option("--context", help="Tokens in a window of perplexity.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens of each text at most.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="Multiple-choice file, `continuation:TEXT`, or an lm-eval name; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Items of each task at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", help="Worked examples before a question.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Sequences run at once.")] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure prefill and decode in turns.")] = True,
    generation: Annotated[bool, typer.Option("--generation/--no-generation", help="Let the models write.")] = True,
    gate: Annotated[bool, typer.Option("--gate", help="Exit code 1 when the generation check fails.")] = False,
    seed: o.SeedOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    max_memory: o.MaxMemoryOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Measure perplexity, tasks, stability, generation, speed and size of models, alone or against an original."""
    from llm_streamline.evaluation.config import EvaluationConfig
    from llm_streamline.schema import parse

    given = {
        "perplexity": perplexity or None,
        "context": context,
        "tokens": tokens,
        "tasks": tasks or None,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "speed": speed,
        "generation": generation,
        "gate": gate,
        "seed": seed,
    }
    config = parse(EvaluationConfig, {k: v for k, v in given.items() if v is not None}, "options")
    from llm_streamline.pipeline import evaluate as run

    place = {"dtype": dtype or "auto", "device": device or "auto", "max_memory": max_memory}
    results = run(models, config, against=against, out=out, **place)
    if as_json:
        terminal.print_json(results.model_dump(mode="json"))
    else:
        terminal.show_results(results)
        print(f"results: {out}")
    if gate and any(c.generation is not None and not c.generation.ok for c in results.comparisons):
        raise typer.Exit(1)


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
