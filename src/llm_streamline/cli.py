"""The command line: parse, call one library function, print. The answer goes to stdout, progress to stderr.

Exit codes: 0 done; 1 the run or a check failed; 2 the input was refused; 130 and 143 it was told to stop by SIGINT or
SIGTERM, and goes on when the same command is given again. Heavy imports are inside the commands, so that
`--help` answers at once.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_streamline import interrupt, logs, ranks, terminal
from llm_streamline import options as o
from llm_streamline.errors import StreamlineError
from llm_streamline.version import __version__

_LOUDNESS = ("-q", "--quiet", "-v", "-vv", "--verbose")
app = typer.Typer(
    help=(
        "Make a large language model smaller: remove the layers it does not need, train a lightweight network in their "
        "place, prove that the result loads and generates, and say what was lost."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llm-streamline {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="More; twice for everything.")] = 0,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    logs.set_verbosity(-1 if quiet or not ranks.is_main() else verbose)


@app.command()
def compress(
    model: o.ModelArg,
    out: o.OutOption,
    layers: o.LayersOption = None,
    sparsity: o.SparsityOption = None,
    params: o.ParamsOption = None,
    memory: o.MemoryOption = None,
    kv_cache: o.KvCacheOption = None,
    latency: o.LatencyOption = None,
    count: o.CountOption = None,
    span: o.SpanOption = None,
    method: o.MethodOption = None,
    verify: o.VerifyOption = None,
    text: o.TextOption = None,
    calibration_tokens: o.CalibrationOption = None,
    train_tokens: o.TrainTokensOption = None,
    seq_len: o.SeqLenOption = None,
    replacement: o.ReplacementOption = None,
    objective: o.ObjectiveOption = None,
    trainable: o.TrainableOption = None,
    recipe: o.RecipeOption = None,
    seed: o.SeedOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    max_memory: o.MaxMemoryOption = None,
    cache_states: o.CacheStatesOption = None,
    fresh: o.FreshOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Do everything: measure, decide, remove, train, save, prove, evaluate, report."""
    given = {k: v for k, v in locals().items() if k in o.RECIPE_OPTIONS}
    from llm_streamline.config import load_recipe

    wanted = load_recipe(recipe, o.overrides(**given))
    from llm_streamline.pipeline import compress as run

    outcome = run(model, out, wanted, fresh=fresh, recipe_name=str(recipe) if recipe else None)
    terminal.show_outcome(outcome, as_json)


@app.command()
def analyze(
    model: o.ModelArg,
    out: o.OutOption,
    text: o.TextOption = None,
    calibration_tokens: o.CalibrationOption = None,
    seq_len: o.SeqLenOption = None,
    recipe: o.RecipeOption = None,
    seed: o.SeedOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    max_memory: o.MaxMemoryOption = None,
    fresh: o.FreshOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Measure the similarity of every span of layers in one pass; write statistics and a heat map."""
    given = {k: v for k, v in locals().items() if k in o.RECIPE_OPTIONS}
    from llm_streamline.config import load_recipe

    wanted = load_recipe(recipe, o.overrides(**given))
    from llm_streamline.pipeline import analyze as run

    statistics = run(model, out, wanted, fresh=fresh)
    info, num_layers = statistics.info, statistics.info.model.num_layers
    answer = {
        "out": str(out),
        "num_layers": num_layers,
        "num_tokens": info.num_tokens,
        "num_spans": num_layers * (num_layers + 1) // 2,
        "seconds": info.seconds,
        "massive_activation_layers": statistics.massive_layers,
        "similarity": [[round(v, 8) for v in row] for row in statistics.similarity.tolist()],
    }
    if as_json:
        terminal.print_json(answer)
        return
    print(f"{answer['num_spans']} spans of {num_layers} layers over {info.num_tokens:,} tokens in {info.seconds:.1f} s")
    if statistics.massive_layers:
        print(f"massive activation at the first token made by layer(s) {statistics.massive_layers}")
    print(f"statistics and heat map: {Path(out) / 'streamline'}")


@app.command()
def plan(
    model: o.ModelArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan file to write.")] = Path("plan.json"),
    stats: Annotated[Path | None, typer.Option("--stats", help="Folder of an earlier `analyze`.")] = None,
    layers: o.LayersOption = None,
    sparsity: o.SparsityOption = None,
    params: o.ParamsOption = None,
    memory: o.MemoryOption = None,
    kv_cache: o.KvCacheOption = None,
    latency: o.LatencyOption = None,
    count: o.CountOption = None,
    span: o.SpanOption = None,
    method: o.MethodOption = None,
    verify: o.VerifyOption = None,
    text: o.TextOption = None,
    calibration_tokens: o.CalibrationOption = None,
    train_tokens: o.TrainTokensOption = None,
    seq_len: o.SeqLenOption = None,
    replacement: o.ReplacementOption = None,
    objective: o.ObjectiveOption = None,
    trainable: o.TrainableOption = None,
    recipe: o.RecipeOption = None,
    seed: o.SeedOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    from_slices: o.FromSlicesOption = None,
    max_memory: o.MaxMemoryOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Decide what to remove and write plan.json; the model is not changed. This is the dry run."""
    given = {k: v for k, v in locals().items() if k in o.RECIPE_OPTIONS}
    if from_slices is not None:
        o.refuse_beside("--from-slices", given, recipe=recipe, stats=stats)
        from llm_streamline.pipeline import plan_from_slices

        made, preview = plan_from_slices(from_slices, model, out=out)
    else:
        from llm_streamline.config import load_recipe

        wanted = load_recipe(recipe, o.overrides(**given))
        from llm_streamline.pipeline import make_plan

        made, preview = make_plan(model, wanted, stats=stats, out=out)
    if as_json:
        terminal.print_json({"out": str(out), "plan": made.model_dump(mode="json"), "preview": vars(preview)})
        return
    terminal.show_plan(made, preview)
    print(f"plan: {out}")


@app.command()
def apply(
    plan: o.PlanOrSlicesArg,
    model: o.ModelArg,
    out: o.OutOption,
    stream: o.StreamOption = False,
    recipe: o.RecipeOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    max_memory: o.MaxMemoryOption = None,
    fresh: o.FreshOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Edit the model as a plan says, train nothing, save and prove the checkpoint."""
    from llm_streamline.config import load_recipe

    wanted = load_recipe(recipe, o.overrides(device=device, dtype=dtype, max_memory=max_memory))
    from llm_streamline.pipeline import apply_plan

    terminal.show_outcome(apply_plan(plan, model, out, wanted, fresh=fresh, stream=stream), as_json)


@app.command()
def train(
    plan: o.PlanArg,
    model: o.ModelArg,
    out: o.OutOption,
    text: o.TextOption = None,
    train_tokens: o.TrainTokensOption = None,
    seq_len: o.SeqLenOption = None,
    objective: o.ObjectiveOption = None,
    trainable: o.TrainableOption = None,
    recipe: o.RecipeOption = None,
    seed: o.SeedOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    max_memory: o.MaxMemoryOption = None,
    cache_states: o.CacheStatesOption = None,
    fresh: o.FreshOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Train the networks of a plan, or more of the model, install them, save and prove the checkpoint."""
    given = {k: v for k, v in locals().items() if k in o.RECIPE_OPTIONS}
    from llm_streamline.config import load_recipe

    wanted = load_recipe(recipe, o.overrides(**given))
    from llm_streamline.pipeline import train_replacement

    terminal.show_outcome(train_replacement(plan, model, out, wanted, fresh=fresh), as_json)


@app.command()
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


@app.command()
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


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]) -> None:
    """Write the report page again, from the files of a run."""
    from llm_streamline.report.html import write_report

    print(write_report(out))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or results files.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write (.html).")] = None,
) -> None:
    """Many runs in one table and one page: differences of settings, then quality against size and speed."""
    from llm_streamline.report.compare import write_comparison
    from llm_streamline.report.run import load_run
    from llm_streamline.report.tables import comparison_tables

    for table in comparison_tables([load_run(run) for run in runs]):
        terminal.console().print(table)
    if out:
        print(write_comparison(runs, out))


@app.command()
def leaderboard(
    spec: Annotated[
        Path, typer.Argument(help="YAML of models, methods and budgets; or a leaderboard's folder, to draw it again.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the leaderboard.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Method, or KEY=VALUE[,VALUE]: method, model, layers, tokens, seed; repeatable."),
    ] = None,
    limit_minutes: Annotated[
        float | None, typer.Option("--limit-minutes", help="Stop after so long; the same command goes on.")
    ] = None,
    text: o.TextOption = None,
    perplexity: Annotated[
        list[str] | None, typer.Option("--perplexity", help="Text to evaluate on; repeatable.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="Multiple-choice file or task; repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, a recipe key for every run (evaluation.tokens=16384); repeatable."),
    ] = None,
    device: o.DeviceOption = None,
    retry: Annotated[bool, typer.Option("--retry", help="Also what was refused or failed before.")] = False,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="Leave the checkpoints in OUT/runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and how they stand; run nothing.")] = False,
    as_json: o.JsonOption = False,
) -> None:
    """Models x methods x budgets: run what is missing, then one page that says which is best, and at what cost."""
    from llm_streamline.errors import ConfigError
    from llm_streamline.leaderboard.page import draw
    from llm_streamline.leaderboard.records import Shelf

    if spec.is_dir():
        terminal.show_leaderboard(draw(Shelf(spec)), [], as_json)
        return
    if out is None:
        raise ConfigError("leaderboard wants -o FOLDER beside a specification")
    from llm_streamline.leaderboard.board import read_settings
    from llm_streamline.leaderboard.make import make_leaderboard

    given = {
        **read_settings(settings or []),
        "text.sources": text,
        "evaluation.perplexity": perplexity,
        "evaluation.tasks": tasks,
        "device": device,
    }
    made = make_leaderboard(
        spec,
        out,
        overrides={key: value for key, value in given.items() if value is not None and value != []},
        only=only or [],
        limit_minutes=limit_minutes,
        retry=retry,
        keep_weights=keep_weights,
        dry_run=dry_run,
    )
    terminal.show_leaderboard(made.data, made.records, as_json)


@app.command()
def export(
    run: Annotated[
        str,
        typer.Argument(help="Folder of a run; a plan.json for --slices; a .gguf file for --plan.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File (for --onnx folder) to write.", show_default=False)],
    gguf: Annotated[
        str | None, typer.Option("--gguf", help="F32, F16, BF16, Q8_0, Q4_0, ...: a GGUF file of that type.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="A folder with an ONNX model, checked with ONNX Runtime.")
    ] = False,
    slices: Annotated[bool, typer.Option("--slices", help="mergekit's slices, for a run that only removes.")] = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Cut a GGUF file by this plan without leaving the format.")
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Write a run as a GGUF file, an ONNX model or mergekit slices, or cut a GGUF file by a plan."""
    from llm_streamline.errors import ConfigError

    if sum((gguf is not None, onnx, slices, plan is not None)) != 1:
        raise ConfigError("export wants exactly one of --gguf TYPE, --onnx, --slices, --plan FILE")
    if slices:
        from llm_streamline.export.slices import to_slices
        from llm_streamline.export.whole_file import new_file

        text = to_slices(terminal.plan_of(run))
        with new_file(out) as path:
            path.write_text(text, encoding="utf-8")
        answer = {"out": str(out)}
    elif plan is not None:
        from llm_streamline.export.gguf_cut import cut_gguf
        from llm_streamline.plan import Plan

        answer = terminal.export_answer(cut_gguf(run, out, Plan.load(plan)))
    elif onnx:
        from llm_streamline.export.onnx import export_onnx

        answer = terminal.export_answer(export_onnx(run, out))
    else:
        from llm_streamline.export.gguf import export_gguf

        answer = terminal.export_answer(export_gguf(run, out, gguf))
    if as_json:
        terminal.print_json(answer)
    else:
        print(" ".join(f"{name}: {value}" for name, value in answer.items()))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Hub repository: name or user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
) -> None:
    """Upload a finished run to the Hub, with its model card."""
    from llm_streamline.export.hub import push as upload

    print(upload(run, repo, private))


@app.command()
def simulate(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, config.json, model type with --size, Hub id, .gguf or `demo`; no weights are read.",
            show_default=False,
        ),
    ],
    size: Annotated[
        list[str] | None, typer.Option("--size", help="KEY=VALUE of the config; may be repeated.", metavar="KEY=VALUE")
    ] = None,
    rates: Annotated[
        str, typer.Option("--rates", help="Device of the table, or `here` to measure this machine.")
    ] = "h100-sxm",
    devices: Annotated[int, typer.Option("--devices", min=1, help="Devices, one process each.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="The original's weights are split over the devices.")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="The same run on 1, 2, 4 ... 64 devices.")] = False,
    layers: o.LayersOption = None,
    sparsity: o.SparsityOption = None,
    params: o.ParamsOption = None,
    count: o.CountOption = None,
    span: o.SpanOption = None,
    verify: o.VerifyOption = None,
    calibration_tokens: o.CalibrationOption = None,
    train_tokens: o.TrainTokensOption = None,
    seq_len: o.SeqLenOption = None,
    replacement: o.ReplacementOption = None,
    objective: o.ObjectiveOption = None,
    recipe: o.RecipeOption = None,
    dtype: o.DtypeOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """What a run would cost, from the config alone: operations, bytes, time and memory on any number of devices."""
    given = {k: v for k, v in locals().items() if k in o.RECIPE_OPTIONS}
    from llm_streamline.config import load_recipe
    from llm_streamline.simulate.answer import print_simulation, simulate_run

    wanted = load_recipe(recipe, o.overrides(**given))
    answer = simulate_run(model, wanted, sizes=size or (), rates=rates, devices=devices, shard=shard, scaling=scaling)
    if as_json:
        terminal.print_json(answer)
    else:
        print_simulation(answer)


@app.command()
def architectures(as_json: o.JsonOption = False) -> None:
    """List the model families of the installed transformers: sound, refused with the reason, or untested."""
    from llm_streamline.architectures import list_architectures, proven_on

    found = list_architectures()
    print(proven_on(), file=sys.stderr)
    if as_json:
        terminal.print_json([{"model_type": f.model_type, "status": f.status, "reason": f.reason} for f in found])
        return
    for one in found:
        print(f"{one.model_type:28} {one.status:9} {one.reason or ''}".rstrip())


@app.command()
def methods(as_json: o.JsonOption = False) -> None:
    """List the methods of choosing layers, with their papers."""
    from llm_streamline.methods.registry import find_method, method_names

    found = [find_method(name) for name in method_names()]
    if as_json:
        terminal.print_json([{"name": m.name, "paper": m.paper, "summary": m.summary} for m in found])
        return
    for one in found:
        print(f"{one.name:12} {one.paper:18} {one.summary}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("demo-out"),
    recipe: o.RecipeOption = None,
    fresh: o.FreshOption = False,
    as_json: o.JsonOption = False,
) -> None:
    """Compress the demo model (SmolLM2-135M-Instruct, offline) with a small budget and show what came out."""
    from llm_streamline.config import DEMO, load_recipe

    wanted = load_recipe(recipe, None if recipe else DEMO)
    from llm_streamline.pipeline import compress as run

    terminal.show_outcome(run("demo", out, wanted, fresh=fresh), as_json)


def main() -> None:
    """Entry point: one sentence for what the user can mend, a traceback only for our own mistakes."""
    loudness = [word for word in sys.argv[1:] if word in _LOUDNESS]
    others = [word for word in sys.argv[1:] if word not in _LOUDNESS]
    if not ranks.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - rank 0 gives the answer
    try:
        with interrupt.watched():
            app(args=[*loudness, *others], standalone_mode=True)  # -q and -v are understood wherever they stand
    except StreamlineError as problem:
        if ranks.first_to_fail():
            print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        sys.exit(problem.exit_code)
    except interrupt.Stopped as stopped:
        again = shlex.join(word for word in sys.argv[1:] if word != "--fresh")
        if ranks.is_main() and not ranks.somebody_failed():  # else the launcher ends us, because another rank failed
            print(f"stopped by {stopped.name}; to go on: llm-streamline {again}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except Exception:
        if not ranks.first_to_fail():  # another rank failed, and told why; this one only misses it
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
