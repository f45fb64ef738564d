"""Commands that obey a plan: `apply` edits the model and trains nothing, `train` trains what was put in."""

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal


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
    wanted = o.recipe_of(locals())
    from llm_streamline.pipeline import apply_plan

    terminal.show_outcome(apply_plan(plan, model, out, wanted, fresh=fresh, stream=stream), as_json)


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
    wanted = o.recipe_of(locals())
    from llm_streamline.pipeline import train_replacement

    terminal.show_outcome(train_replacement(plan, model, out, wanted, fresh=fresh), as_json)
