"""The stage that measures what was lost: the compressed model beside the original."""

from pathlib import Path

from llm_streamline.config import Recipe
from llm_streamline.data.overlap import check_text_unseen
from llm_streamline.data.windows import Windows
from llm_streamline.errors import TextError
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.evaluate import evaluate
from llm_streamline.evaluation.material import gather
from llm_streamline.evaluation.result import HELD_OUT, Results
from llm_streamline.logs import get_logger
from llm_streamline.output import TOOL_FOLDER
from llm_streamline.plan import Plan
from llm_streamline.runs.folder import WORK_FOLDER, command_line
from llm_streamline.sources import LoadedModel, ModelSource, load_model, resolve_model

log = get_logger()


def evaluate_both(
    source: ModelSource,
    recipe: Recipe,
    config: EvaluationConfig,
    plan: Plan,
    out: Path,
    windows: dict[str, Windows],
    *,
    layers_on_disk: bool = False,
) -> Results:
    """The compressed model's results beside those of the original, both loaded from disk; written to results.json.

    Args:
        source: the original.
        recipe: dtype, device, attention.
        config: what to measure.
        plan: what was done to the original.
        out: the run's folder, which holds the compressed model.
        windows: with those of role evaluation.
        layers_on_disk: of both models.
    """
    log.info("evaluating against the original")
    folder = out / TOOL_FOLDER
    options = {"attention": recipe.attn_implementation, "layers_on_disk": layers_on_disk}
    original = load_model(source, recipe.dtype, recipe.device, **options)
    compressed = load_model(resolve_model(str(out)), "auto", recipe.device, **options)
    return evaluate(
        compressed,
        original,
        config,
        out=folder / "results.json",
        windows={HELD_OUT: windows["evaluation"]},
        command=command_line(),
        plan_hash=plan.digest(),
        reference=folder / WORK_FOLDER / "original.json",
    )


def evaluation_wanted(recipe: Recipe, loaded: LoadedModel, windows: dict[str, Windows]) -> EvaluationConfig:
    """The recipe's evaluation; where it names no task, the one made of the held-out text, if that is long enough.

    Raises:
        TextError, TaskError: if a task that the recipe names cannot be made, or a text was trained on: now, not after.
    """
    for spec in recipe.evaluation.perplexity:
        check_text_unseen(spec, [windows["calibration"], windows["train"], windows["validation"]])
    config, held_out = recipe.evaluation, {HELD_OUT: windows["evaluation"]}
    if config.tasks:
        gather(config, loaded.tokenizer, held_out)
        return config
    wanted = config.model_copy(update={"tasks": ("continuation",)})
    try:
        gather(wanted, loaded.tokenizer, held_out)
    except TextError as problem:
        log.info("no accuracy and no stability will be measured: %s", problem)
        return config
    return wanted
