"""Commands that only read the model: `analyze` measures its layers, `plan` decides what to remove."""

from pathlib import Path
from typing import Annotated

import typer

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal


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
    wanted = o.recipe_of(locals())
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
    if from_slices is not None:
        o.refuse_beside("--from-slices", locals(), "recipe", "stats")
        from llm_streamline.pipeline import plan_from_slices

        made, preview = plan_from_slices(from_slices, model, out=out)
    else:
        wanted = o.recipe_of(locals())
        from llm_streamline.pipeline import make_plan

        made, preview = make_plan(model, wanted, stats=stats, out=out)
    if as_json:
        terminal.print_json({"out": str(out), "plan": made.model_dump(mode="json"), "preview": vars(preview)})
        return
    terminal.show_plan(made, preview)
    print(f"plan: {out}")
