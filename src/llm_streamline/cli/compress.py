"""Commands for a whole run: `compress`, and `demo` on the model that comes as a package."""

from pathlib import Path
from typing import Annotated

import typer

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal


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
    wanted = o.recipe_of(locals())
    from llm_streamline.pipeline import compress as run

    outcome = run(model, out, wanted, fresh=fresh, recipe_name=str(recipe) if recipe else None)
    terminal.show_outcome(outcome, as_json)
    terminal.stop_at_gate(outcome.results)


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
