"""Whole runs, readable top to bottom: each function is one command of the line, calling the stages in order.

source -> windows -> statistics -> plan -> edited model -> trained model -> verified checkpoint -> results -> report
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llm_streamline import ranks
from llm_streamline.checkpoint import probe_texts
from llm_streamline.config import Recipe, load_recipe
from llm_streamline.errors import OutputError, PlanError
from llm_streamline.estimates.budget import ALL_WORK, fit
from llm_streamline.estimates.forecast import announce
from llm_streamline.estimates.preview import preview_plan
from llm_streamline.estimates.saving import expected_saving_time
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.evaluate import evaluate as run_evaluation
from llm_streamline.evaluation.material import check_config
from llm_streamline.evaluation.result import Results
from llm_streamline.evaluation.size import model_size
from llm_streamline.logs import get_logger
from llm_streamline.measure.files import Statistics
from llm_streamline.offload import is_streamed
from llm_streamline.output import (
    TOOL_FOLDER,
    check_output,
    is_complete,
    read_manifest,
    remove_manifest,
    write_text,
)
from llm_streamline.plan import Plan, Replace
from llm_streamline.proof import Proof
from llm_streamline.report.tables import Preview
from llm_streamline.runs.folder import command_line, finish, opened, protected, write_recipe
from llm_streamline.runs.ledger import key_of
from llm_streamline.runs.resume import (
    STAGES,
    decided,
    evaluated,
    measured,
    prepared,
    trained_checkpoint,
    window_hashes,
)
from llm_streamline.runtime import versions
from llm_streamline.runtimes import plan_warnings
from llm_streamline.sources import LoadedModel, ModelSource, load_model, resolve_model
from llm_streamline.stages.checks import check_early, check_text, check_wishes
from llm_streamline.stages.decide import decide
from llm_streamline.stages.evaluate import evaluation_wanted
from llm_streamline.stages.measure import measure, time_layers
from llm_streamline.stages.original import load_original, model_facts
from llm_streamline.stages.prove import install_and_prove
from llm_streamline.stages.start import untrained
from llm_streamline.stages.train import Trained
from llm_streamline.stages.windows import make_windows
from llm_streamline.stages.wishes import settled
from llm_streamline.training.heal import check_healing
from llm_streamline.training.reach import settle_reach
from llm_streamline.without_weights import apply_on_files, preview_without_weights, read_slices

log = get_logger()


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    out: Path
    plan: Plan
    preview: Preview
    results: Results | None
    proof: Proof | None
    report: Path | None


def analyze(model: str, out: str | Path, recipe: Recipe | None = None, *, fresh: bool = False) -> Statistics:
    """Measure the similarity of every span and write statistics and heat map.

    Args:
        model: folder, Hub id, .gguf file or `demo`.
        out: folder to write `streamline/stats.json`, `stats.safetensors` and `similarity.png` to.
        recipe: text, calibration, dtype, device.
        fresh: start over.

    Raises:
        StreamlineError: whatever is wrong with model, text or folder, before the slow work.
    """
    recipe = recipe or Recipe()
    ranks.start(recipe.device)
    source = ranks.main_first(lambda: resolve_model(model))
    ranks.main_first(lambda: check_early(source, recipe))
    ranks.from_main(lambda: check_output(out, source=protected(source)))
    recipe, loaded = _loaded(source, recipe, ("measure",))
    check_text(loaded, recipe)
    with opened(out, fresh, source) as run:
        with run.taken_back_if_refused():
            windows = prepared(loaded, recipe, ("calibration",), run.folder, run.ledger)
        return measured(loaded, windows["calibration"], recipe, run.folder, run.ledger)


def make_plan(
    model: str, recipe: Recipe | None = None, *, stats: str | Path | None = None, out: str | Path | None = None
) -> tuple[Plan, Preview]:
    """Decide what to remove; the model is not changed. This is the dry run.

    Args:
        model: folder, Hub id, .gguf file or `demo`.
        recipe: target, selection, replacement, training (for the estimate).
        stats: folder of an earlier `analyze`; None measures now.
        out: file to write the plan to.

    Raises:
        StreamlineError: whatever is wrong, before the slow work.
    """
    recipe = settled(recipe or Recipe())
    ranks.start(recipe.device)
    source = ranks.main_first(lambda: resolve_model(model))
    ranks.main_first(lambda: check_early(source, recipe))
    statistics = Statistics.load(stats) if stats else None
    if out is not None:
        ranks.from_main(lambda: _check_plan_file(Path(out)))
    recipe, loaded = _loaded(source, recipe, ("verify",) if statistics else ("measure", "verify"))
    if statistics:
        _check_statistics(statistics, loaded)
    check_wishes(loaded, recipe)
    windows = make_windows(loaded, recipe, ("calibration", "train", "validation"), None)
    if statistics is None:
        statistics = measure(loaded, windows["calibration"], recipe)
    plan = decide(loaded, recipe, statistics, windows)
    if out is not None:
        write_text(Path(out), plan.to_json())
    return plan, _preview(loaded, plan, recipe, statistics)


def plan_from_slices(slices: str | Path, model: str, *, out: str | Path | None = None) -> tuple[Plan, Preview]:
    """The plan that a file of mergekit's slices describes; no weights are read and no text is needed.

    Args:
        slices: YAML for mergekit's merge method passthrough.
        model: folder, Hub id, .gguf file or `demo`: the model the slices are taken from.
        out: file to write the plan to.

    Raises:
        PlanError: the file says something else than which layers of one model stay.
    """
    source = resolve_model(model)
    if out is not None:
        _check_plan_file(Path(out))
    plan = read_slices(slices, source)
    if out is not None:
        write_text(Path(out), plan.to_json())
    return plan, preview_without_weights(source, plan)


def apply_plan(
    plan: Plan | str | Path,
    model: str,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    fresh: bool = False,
    stream: bool = False,
) -> Outcome:
    """Edit the model as the plan says, train nothing, save and prove the checkpoint.

    A network starts as its plan says where that needs no text; `best` starts as a copy or as plain removal, and so does
    the `closed_form` of a network of layers.

    Args:
        plan: a plan, its file, or a file of mergekit's slices (.yaml).
        model: folder, Hub id, .gguf file or `demo`.
        out: output folder.
        recipe: device and dtype.
        fresh: start over.
        stream: cut the files tensor by tensor instead of loading the model; for plans that only remove layers.

    Raises:
        PlanError: the plan was made for another model, its networks are nothing until they are fitted to text, or it
            cannot be streamed.
        ProofError: the saved checkpoint does not behave like the model in memory.
    """
    if not isinstance(plan, Plan) and Path(plan).suffix.lower() in (".yaml", ".yml"):
        plan = read_slices(plan, resolve_model(model))
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    recipe = recipe or Recipe()
    if stream:
        out, preview, proof = apply_on_files(plan, model, out, recipe, fresh=fresh)
        return Outcome(out, plan, preview, None, proof, None)
    _check_needs_no_text(plan)
    recipe = recipe.model_copy(update={"quantization": "none"})  # nothing is measured or trained
    asked = recipe
    recipe, source, loaded = _begin_from_plan(plan, model, out, recipe, ("save",), with_text=False)
    preview = _preview(loaded, plan, recipe, None, Path(out))
    networks = Trained(untrained(loaded, plan, recipe.seed), None, None)
    texts = ranks.from_main(partial(probe_texts, loaded.model, loaded.tokenizer))
    with opened(out, fresh, source) as run:
        with run.taken_back_if_refused():
            remove_manifest(run.out)
            proof = install_and_prove(loaded, plan, networks, run.out, texts)
        finish(run.out, plan, asked, loaded.source, {"stage": "apply"})
    return Outcome(run.out, plan, preview, None, proof, None)


def train_replacement(
    plan: Plan | str | Path, model: str, out: str | Path, recipe: Recipe | None = None, *, fresh: bool = False
) -> Outcome:
    """Train the plan's networks, or whatever else the recipe names, install it, save and prove the checkpoint.

    Raises:
        PlanError: the plan was made for another model, or puts no network back and nothing else is to be trained.
        ProofError: the saved checkpoint does not behave like the model in memory.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    recipe = recipe or Recipe()
    has_network = any(isinstance(edit, Replace) for edit in plan.edits)
    if not has_network and not recipe.training.heals:
        raise PlanError(
            "this plan puts no network back, so there is nothing to train: use `llm-streamline apply`, or name with "
            "--trainable what of the original is to be trained"
        )
    asked = recipe
    recipe, source, loaded = _begin_from_plan(plan, model, out, recipe, ("start", "train", "save"))
    check_healing(loaded.model, recipe.training, has_network)
    check_text(loaded, recipe)
    preview = _preview(loaded, plan, recipe, None, Path(out))
    with opened(out, fresh, source) as run:
        with run.taken_back_if_refused():
            windows = prepared(loaded, recipe, ("train", "validation"), run.folder, run.ledger)
        remove_manifest(run.out)
        texts = ranks.from_main(partial(probe_texts, loaded.model, loaded.tokenizer))
        proof = trained_checkpoint(loaded, plan, recipe, windows, run.out, run.ledger, texts)
        finish(run.out, plan, asked, loaded.source, {"stage": "train"})
    return Outcome(run.out, plan, preview, None, proof, None)


def evaluate(
    models: Sequence[str],
    config: EvaluationConfig | None = None,
    *,
    against: str | None = None,
    out: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_memory: str | None = None,
) -> Results:
    """Measure models, alone and against an original; one model and the original are in memory at a time.

    Args:
        models: folders, Hub ids, .gguf files or `demo`.
        config: what to measure.
        against: the original.
        out: results file (.json); per-item logs go beside it.
        dtype: of all models.
        device: of all models.
        max_memory: as in 4GiB, or auto; layers are then streamed from disk.

    Raises:
        StreamlineError: whatever is wrong with models, texts or tasks, before the slow work.
    """
    config = config or EvaluationConfig()
    ranks.start(device)
    sources = [ranks.main_first(lambda model=model: resolve_model(model)) for model in models]
    original_source = ranks.main_first(lambda: resolve_model(against)) if against else None
    ranks.from_main(lambda: check_config(config))
    config, on_disk = _fitted_evaluation(
        [*sources, *filter(None, [original_source])], config, dtype, device, max_memory
    )

    def load(source: ModelSource) -> LoadedModel:
        return load_model(source, dtype, device, layers_on_disk=source.spec in on_disk)

    original = load(original_source) if original_source else None
    loaded = (load(source) for source in sources)
    return run_evaluation(loaded, original, config, out=out, command=command_line())


def compress(
    model: str, out: str | Path, recipe: Recipe | None = None, *, fresh: bool = False, recipe_name: str | None = None
) -> Outcome:
    """The whole line: measure, decide, train, save, prove, evaluate, report.

    Killed at any moment, the same call goes on where it was; a call with another recipe redoes what that changes.

    Args:
        model: folder, Hub id, .gguf file or `demo`.
        out: output folder: a plain Hugging Face folder with one sub-folder `streamline/`.
        recipe: everything a run can be told; None is the default recipe.
        fresh: start over.
        recipe_name: how the user named the recipe, for the model card.

    Raises:
        StreamlineError: whatever is wrong with model, text, target or folder, before the slow work.
        ProofError: the saved checkpoint does not behave like the model in memory.
    """
    recipe = settled(recipe or Recipe())
    ranks.start(recipe.device)
    source = ranks.main_first(lambda: resolve_model(model))
    ranks.main_first(lambda: check_early(source, recipe))
    ranks.from_main(lambda: check_config(recipe.evaluation))
    ranks.from_main(lambda: check_output(out, source=protected(source)))
    asked = recipe
    recipe, loaded = _loaded(source, recipe, ALL_WORK, out=Path(out))
    check_wishes(loaded, recipe)
    check_text(loaded, recipe)
    with opened(out, fresh, source) as run:
        out, folder, ledger = run.out, run.folder, run.ledger
        with run.taken_back_if_refused():
            roles = ("calibration", "train", "validation", "evaluation")
            windows = prepared(loaded, recipe, roles, folder, ledger)
            wanted = evaluation_wanted(recipe, loaded, windows)
        wishes = asked.model_dump(mode="json", exclude={"max_memory", "cache_states"})  # they change no result
        run_key = key_of(source.fingerprint, wishes, window_hashes(windows))
        is_this = ranks.from_main(lambda: is_complete(out) and read_manifest(out).get("key") == run_key)
        if is_this and ledger.is_intact(STAGES):
            log.info("%s holds this very run already, finished; --fresh starts over", out)
            return _found(out, loaded, recipe)
        remove_manifest(out)
        write_recipe(folder, asked)
        statistics = measured(loaded, windows["calibration"], recipe, folder, ledger)
        plan = decided(loaded, recipe, statistics, windows, folder, ledger)
        preview = _preview(loaded, plan, recipe, statistics, out)
        _announce(plan, preview)
        texts = ranks.from_main(partial(probe_texts, loaded.model, loaded.tokenizer))
        proof = trained_checkpoint(loaded, plan, recipe, windows, out, ledger, texts)
        on_disk = is_streamed(loaded.model)
        del loaded
        gc.collect()
        results = evaluated(source, recipe, wanted, plan, out, ledger, windows, layers_on_disk=on_disk)
        manifest = {"key": run_key, "recipe_name": recipe_name}
        report = finish(out, plan, asked, source, manifest)
    return Outcome(out, plan, preview, results, proof, report)


# --- small helpers


def _loaded(
    source: ModelSource, recipe: Recipe, work: tuple[str, ...], plan: Plan | None = None, out: Path | None = None
) -> tuple[Recipe, LoadedModel]:
    """The model, and the recipe as it will be run: with batch sizes that fit `max_memory`, when there is one."""
    wished = _as_planned(recipe, plan) if plan else recipe
    fitted = ranks.from_main(lambda: fit(source, wished, work))  # one batch size for all processes
    loaded = load_original(source, recipe, fitted)
    recipe = settle_reach(recipe, loaded, wished.replacement.kind != "none")
    if fitted is None:
        return recipe, loaded
    announce(loaded, fitted, work, out)
    sizes = {"calibration": fitted.recipe.calibration, "evaluation": fitted.recipe.evaluation}
    return recipe.model_copy(update=sizes), loaded


def _fitted_evaluation(
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


def _as_planned(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with a plan's span and network as its wish, to see what they need."""
    edit = next((edit for edit in plan.edits if isinstance(edit, Replace)), plan.edits[0] if plan.edits else None)
    if edit is None:
        return recipe
    span = recipe.selection.model_copy(update={"span": (edit.start, edit.stop)})
    network = {"kind": "none"}
    if isinstance(edit, Replace):
        network = {"kind": edit.network.kind, "count": edit.network.count, "init": edit.network.init}
    return recipe.model_copy(update={"selection": span, "replacement": recipe.replacement.model_copy(update=network)})


def _begin_from_plan(
    plan: Plan, model: str, out: str | Path, recipe: Recipe, work: tuple[str, ...], with_text: bool = True
) -> tuple[Recipe, ModelSource, LoadedModel]:
    """Load the model of a plan and refuse what does not fit; nothing is written yet."""
    ranks.start(recipe.device)
    source = ranks.main_first(lambda: resolve_model(model))
    no_wishes = {"target": type(recipe.target)(), "selection": type(recipe.selection)()}  # the plan is the wish
    wishes = recipe.model_copy(update=no_wishes)
    ranks.main_first(lambda: check_early(source, wishes, with_text=with_text))
    ranks.from_main(lambda: check_output(out, source=protected(source)))
    recipe, loaded = _loaded(source, recipe, work, plan, Path(out))
    plan.check_fits(model_facts(loaded))
    for warning in plan_warnings(loaded.model.config, plan):
        log.warning("%s", warning)
    return recipe, source, loaded


def _check_needs_no_text(plan: Plan) -> None:
    for edit in plan.edits:
        if isinstance(edit, Replace) and edit.network.is_fitted:
            raise PlanError(
                f"the {edit.network.kind} in place of [{edit.start}, {edit.stop}) is fitted to text "
                f"({edit.network.init}), and apply reads none; use `llm-streamline train PLAN MODEL --train-tokens 0`"
            )


def _preview(
    loaded: LoadedModel, plan: Plan, recipe: Recipe, statistics: Statistics | None, out: Path | None = None
) -> Preview:
    here = versions()
    same_machine = statistics and {k: v for k, v in statistics.info.machine.items() if k in ("platform", "cpus", "gpu")}
    if same_machine and all(here.get(name) == value for name, value in same_machine.items()):
        seconds = statistics.info.layer_seconds_per_token
    else:
        seconds = time_layers(loaded, recipe)
    size = model_size(loaded.model)
    preview = preview_plan(loaded.model, size, plan, recipe.training, recipe.text.seq_len, seconds)
    closing = expected_saving_time(loaded, plan, preview.weight_bytes[1], seconds, out)
    preview = replace(preview, saving_seconds=vars(closing))
    if loaded.fitted is None or preview.peak_memory_bytes is None:
        return preview
    return replace(preview, peak_memory_bytes=loaded.fitted.training_peak(_as_planned(recipe, plan)))


def _announce(plan: Plan, preview: Preview) -> None:
    log.info("%s", plan.describe())
    for warning in plan.selection.warnings if plan.selection else ():
        log.warning("%s", warning)
    if preview.train_seconds:
        log.info("training will take about %.0f minutes here", max(1, preview.train_seconds / 60))
    if preview.saving_seconds:
        log.info(
            "saving and proving will take about %.0f seconds here: writing %.1f, a fresh process %.1f, loading %.1f, "
            "its forwards %.1f",
            sum(preview.saving_seconds.values()),
            *(preview.saving_seconds[part] for part in ("write", "start", "reload", "forwards")),
        )


def _check_statistics(statistics: Statistics, loaded: LoadedModel) -> None:
    if statistics.info.model.fingerprint != loaded.source.fingerprint:
        raise PlanError(
            f"these statistics are of '{statistics.info.model.spec}', not of '{loaded.source.spec}'; "
            "run analyze on this model"
        )


def _check_plan_file(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file for the plan, such as {path / 'plan.json'}")
    if path.exists():
        Plan.load(path)  # only a plan is ever overwritten by a plan


def _found(out: Path, loaded: LoadedModel, recipe: Recipe) -> Outcome:
    folder = out / TOOL_FOLDER
    plan = Plan.load(folder / "plan.json")
    statistics = Statistics.load(folder)
    results = Results.load(folder / "results.json")
    return Outcome(out, plan, _preview(loaded, plan, recipe, statistics, out), results, None, folder / "report.html")
