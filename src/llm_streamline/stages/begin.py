"""How a run begins: what recipe and plan need is fitted to the memory there is, and the original is loaded."""

from collections.abc import Sequence
from pathlib import Path

from llm_streamline import ranks
from llm_streamline.config import Recipe, load_recipe
from llm_streamline.estimates.budget import fit
from llm_streamline.estimates.forecast import announce
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.logs import get_logger
from llm_streamline.output import check_output
from llm_streamline.plan import Plan, Replace
from llm_streamline.runs.folder import protected
from llm_streamline.runtimes import plan_warnings
from llm_streamline.sources import LoadedModel, ModelSource, resolve_model
from llm_streamline.stages.checks import check_early
from llm_streamline.stages.original import load_original, model_facts
from llm_streamline.training.reach import settle_reach

log = get_logger()


def load_fitting(
    source: ModelSource, recipe: Recipe, work: tuple[str, ...], plan: Plan | None = None, out: Path | None = None
) -> tuple[Recipe, LoadedModel]:
    """The model, and the recipe as it will be run: with batch sizes that fit `max_memory`, when there is one."""
    wished = as_planned(recipe, plan) if plan else recipe
    fitted = ranks.from_main(lambda: fit(source, wished, work))  # one batch size for all processes
    loaded = load_original(source, recipe, fitted)
    recipe = settle_reach(recipe, loaded, wished.replacement.kind != "none")
    if fitted is None:
        return recipe, loaded
    announce(loaded, fitted, work, out)
    sizes = {"calibration": fitted.recipe.calibration, "evaluation": fitted.recipe.evaluation}
    return recipe.model_copy(update=sizes), loaded


def begin_from_plan(
    plan: Plan, model: str, out: str | Path, recipe: Recipe, work: tuple[str, ...], with_text: bool = True
) -> tuple[Recipe, ModelSource, LoadedModel]:
    """Load the model of a plan and refuse what does not fit; nothing is written yet."""
    ranks.start(recipe.device)
    source = ranks.main_first(lambda: resolve_model(model))
    no_wishes = {"target": type(recipe.target)(), "selection": type(recipe.selection)()}  # the plan is the wish
    wishes = recipe.model_copy(update=no_wishes)
    ranks.main_first(lambda: check_early(source, wishes, with_text=with_text))
    ranks.from_main(lambda: check_output(out, source=protected(source)))
    recipe, loaded = load_fitting(source, recipe, work, plan, Path(out))
    plan.check_fits(model_facts(loaded))
    for warning in plan_warnings(loaded.model.config, plan):
        log.warning("%s", warning)
    return recipe, source, loaded


def as_planned(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with a plan's span and network as its wish, to see what they need."""
    edit = next((edit for edit in plan.edits if isinstance(edit, Replace)), plan.edits[0] if plan.edits else None)
    if edit is None:
        return recipe
    span = recipe.selection.model_copy(update={"span": (edit.start, edit.stop)})
    network = {"kind": "none"}
    if isinstance(edit, Replace):
        network = {"kind": edit.network.kind, "count": edit.network.count, "init": edit.network.init}
    return recipe.model_copy(update={"selection": span, "replacement": recipe.replacement.model_copy(update=network)})


def fitted_evaluation(
    sources: Sequence[ModelSource], config: EvaluationConfig, dtype: str, device: str, max_memory: str | None
) -> tuple[EvaluationConfig, set[str]]:
    """The evaluation with batches that fit `max_memory`, and which models' layers stay on disk."""
    if max_memory is None:
        return config, set()
    length = {"text.seq_len": config.context or 1024}
    recipe = load_recipe(None, {"dtype": dtype, "device": device, "max_memory": max_memory, **length})
    recipe = recipe.model_copy(update={"evaluation": config})
    fits = {source.spec: fit(source, recipe, ("evaluate",)) for source in sources}
    tightest = min(fits.values(), key=lambda found: found.recipe.evaluation.batch_tokens)
    return tightest.recipe.evaluation, {spec for spec, found in fits.items() if found.layers_on_disk}
