"""Whole runs, readable top to bottom: each function is one command of the line, calling the stages in order.

source -> windows -> statistics -> plan -> edited model -> trained model -> verified checkpoint -> results -> report
"""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_streamline import stages
from llm_streamline.checkpoint import probe_texts, prove_checkpoint, save_checkpoint
from llm_streamline.config import Recipe
from llm_streamline.data.overlap import check_text_unseen
from llm_streamline.data.windows import Windows
from llm_streamline.errors import MissingExtraError, OutputError, PlanError, StreamlineError, TextError
from llm_streamline.estimate import preview_plan
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.evaluate import evaluate as run_evaluation
from llm_streamline.evaluation.material import check_config, gather
from llm_streamline.evaluation.result import Results
from llm_streamline.evaluation.size import model_size
from llm_streamline.logs import get_logger
from llm_streamline.measure.files import Statistics
from llm_streamline.output import (
    TOOL_FOLDER,
    check_output,
    claim,
    is_complete,
    open_output,
    read_manifest,
    remove_manifest,
    withdraw,
    write_json,
    write_manifest,
    write_text,
)
from llm_streamline.plan import Plan, Replace
from llm_streamline.proof import Proof
from llm_streamline.replacements.base import Replacement
from llm_streamline.replacements.build import install_plan
from llm_streamline.replacements.ship import needs_code, shipped_files
from llm_streamline.report.card import write_card
from llm_streamline.report.heatmap import write_heatmap_png
from llm_streamline.report.html import write_report
from llm_streamline.report.tables import Preview
from llm_streamline.runtime import versions
from llm_streamline.sources import LoadedModel, ModelSource, load_model, resolve_model

HELD_OUT = "held-out text"  # name of the run's own evaluation windows in its results
WORK_FOLDER = "work"  # tokens and checkpoints: needed to go on after a kill, not part of the result
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
    source = resolve_model(model)
    stages.check_early(source, recipe)
    check_output(out, source=_protected(source))
    loaded = stages.load_original(source, recipe)
    stages.check_text(loaded, recipe)
    with _opened(out, fresh, source) as out:
        folder = out / TOOL_FOLDER
        windows = stages.make_windows(loaded, recipe, ("calibration",), folder / WORK_FOLDER / "windows")
        return _measured(loaded, windows["calibration"], recipe, folder, stages.Ledger(folder))


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
    recipe = recipe or Recipe()
    source = resolve_model(model)
    stages.check_early(source, recipe)
    statistics = Statistics.load(stats) if stats else None
    if out is not None:
        _check_plan_file(Path(out))
    loaded = stages.load_original(source, recipe)
    if statistics:
        _check_statistics(statistics, loaded)
    stages.check_wishes(loaded, recipe)
    windows = stages.make_windows(loaded, recipe, ("calibration", "train", "validation"), None)
    if statistics is None:
        statistics = stages.measure(loaded, windows["calibration"], recipe)
    plan = stages.decide(loaded, recipe, statistics, windows)
    if out is not None:
        write_text(Path(out), plan.to_json())
    return plan, _preview(loaded, plan, recipe, statistics)


def apply_plan(
    plan: Plan | str | Path, model: str, out: str | Path, recipe: Recipe | None = None, *, fresh: bool = False
) -> Outcome:
    """Edit the model as the plan says, train nothing, save and prove the checkpoint.

    A network starts as its plan says where that needs no text; `best` and `closed_form` start as a copy or as plain
    removal.

    Raises:
        PlanError: the plan was made for another model.
        ProofError: the saved checkpoint does not behave like the model in memory.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    recipe = recipe or Recipe()
    source, loaded = _begin_from_plan(plan, model, out, recipe, with_text=False)
    preview = _preview(loaded, plan, recipe, None)
    replacements = stages.untrained(loaded, plan, recipe.seed)
    texts = probe_texts(loaded.model, loaded.tokenizer)
    with _opened(out, fresh, source) as out:
        remove_manifest(out)
        proof = _install_and_prove(loaded, plan, replacements, out, texts)
    _finish(out, plan, recipe, loaded.source, {"stage": "apply"})
    return Outcome(out, plan, preview, None, proof, None)


def train_replacement(
    plan: Plan | str | Path, model: str, out: str | Path, recipe: Recipe | None = None, *, fresh: bool = False
) -> Outcome:
    """Train the plan's networks, put them into the model, save and prove the checkpoint.

    Raises:
        PlanError: the plan was made for another model, or puts no network back.
        ProofError: the saved checkpoint does not behave like the model in memory.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    if not any(isinstance(edit, Replace) for edit in plan.edits):
        raise PlanError("this plan puts no network back, so there is nothing to train; use `llm-streamline apply`")
    recipe = recipe or Recipe()
    source, loaded = _begin_from_plan(plan, model, out, recipe)
    stages.check_text(loaded, recipe)
    preview = _preview(loaded, plan, recipe, None)
    with _opened(out, fresh, source) as out:
        folder = out / TOOL_FOLDER
        windows = stages.make_windows(loaded, recipe, ("train", "validation"), folder / WORK_FOLDER / "windows")
        remove_manifest(out)
    texts = probe_texts(loaded.model, loaded.tokenizer)
    proof = _trained_checkpoint(loaded, plan, recipe, windows, out, stages.Ledger(folder), texts)
    _finish(out, plan, recipe, loaded.source, {"stage": "train"})
    return Outcome(out, plan, preview, None, proof, None)


def evaluate(
    models: Sequence[str],
    config: EvaluationConfig | None = None,
    *,
    against: str | None = None,
    out: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Results:
    """Measure models, alone and against an original; one model and the original are in memory at a time.

    Args:
        models: folders, Hub ids, .gguf files or `demo`.
        config: what to measure.
        against: the original.
        out: results file (.json); per-item logs go beside it.
        dtype: of all models.
        device: of all models.

    Raises:
        StreamlineError: whatever is wrong with models, texts or tasks, before the slow work.
    """
    config = config or EvaluationConfig()
    sources = [resolve_model(model) for model in models]
    original_source = resolve_model(against) if against else None
    check_config(config)
    original = load_model(original_source, dtype, device) if original_source else None
    loaded = (load_model(source, dtype, device) for source in sources)
    return run_evaluation(loaded, original, config, out=out, command=_command())


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
    recipe = recipe or Recipe()
    source = resolve_model(model)
    stages.check_early(source, recipe)
    check_config(recipe.evaluation)
    check_output(out, source=_protected(source))
    loaded = stages.load_original(source, recipe)
    stages.check_wishes(loaded, recipe)
    stages.check_text(loaded, recipe)
    with _opened(out, fresh, source) as out:
        folder, ledger = out / TOOL_FOLDER, stages.Ledger(out / TOOL_FOLDER)
        roles = ("calibration", "train", "validation", "evaluation")
        windows = stages.make_windows(loaded, recipe, roles, folder / WORK_FOLDER / "windows")
        _check_evaluation_text(recipe, windows)
        wanted = _evaluation_wanted(recipe, loaded, windows)
        run_key = stages.key_of(source.fingerprint, recipe.model_dump(mode="json"), _hashes(windows))
        if is_complete(out) and read_manifest(out).get("key") == run_key:
            log.info("%s holds this very run already, finished; --fresh starts over", out)
            return _found(out, loaded, recipe)
        remove_manifest(out)
        stages.write_recipe(folder, recipe)
        statistics = _measured(loaded, windows["calibration"], recipe, folder, ledger)
    plan = _decided(loaded, recipe, statistics, windows, folder, ledger)
    preview = _preview(loaded, plan, recipe, statistics)
    _announce(plan, preview)
    texts = probe_texts(loaded.model, loaded.tokenizer)
    proof = _trained_checkpoint(loaded, plan, recipe, windows, out, ledger, texts)
    del loaded
    gc.collect()
    results = _evaluated(source, recipe, wanted, plan, out, ledger, windows)
    manifest = {"key": run_key, "recipe_name": recipe_name}
    report = _finish(out, plan, recipe, source, manifest)
    return Outcome(out, plan, preview, results, proof, report)


# --- stages with their ledger


def _measured(
    loaded: LoadedModel, calibration: Windows, recipe: Recipe, folder: Path, ledger: stages.Ledger
) -> Statistics:
    key = stages.key_of(loaded.source.fingerprint, str(loaded.dtype), calibration.provenance["sha256"])
    if ledger.is_done("measure", key):
        log.info("similarities: measured before, taken from %s", folder)
        return Statistics.load(folder)
    with ledger.running("measure", key):
        statistics = stages.measure(loaded, calibration, recipe)
        statistics.save(folder)
        _draw(statistics, folder, None)
    return statistics


def _decided(
    loaded: LoadedModel,
    recipe: Recipe,
    statistics: Statistics,
    windows: dict[str, Windows],
    folder: Path,
    ledger: stages.Ledger,
) -> Plan:
    wishes = recipe.model_dump(mode="json", include={"target", "selection", "replacement", "seed"})
    key = stages.key_of(loaded.source.fingerprint, str(loaded.dtype), wishes, _hashes(windows))
    if ledger.is_done("plan", key):
        plan = Plan.load(folder / "plan.json")
        log.info("plan: made before, taken from %s", folder / "plan.json")
        return plan
    with ledger.running("plan", key):
        plan = stages.decide(loaded, recipe, statistics, windows)
        write_text(folder / "plan.json", plan.to_json())
        _draw(statistics, folder, plan)
    return plan


def _trained_checkpoint(
    loaded: LoadedModel,
    plan: Plan,
    recipe: Recipe,
    windows: dict[str, Windows],
    out: Path,
    ledger: stages.Ledger,
    texts: list[str],
) -> Proof:
    """Train, install, save and prove; a checkpoint that was proven for the same key is left as it is."""
    folder = out / TOOL_FOLDER
    wishes = recipe.model_dump(mode="json", include={"training", "replacement", "seed", "text"})
    hashes = {role: windows[role].provenance["sha256"] for role in ("train", "validation")}
    key = stages.key_of(plan.digest(), str(loaded.dtype), wishes, hashes)
    if ledger.is_done("save", key) and (folder / "proof.json").is_file():
        log.info("checkpoint: trained and proven before, left as it is")
        data = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
        return Proof.model_validate({name: value for name, value in data.items() if name != "ok"})
    work = folder / WORK_FOLDER / key[:16]  # another key must not go on from these checkpoints
    with ledger.running("train", key):
        replacements, history = stages.train(loaded, plan, recipe, windows, work)
        if history is not None:
            write_json(folder / "training.json", history)
        else:
            (folder / "training.json").unlink(missing_ok=True)
    with ledger.running("save", key):
        return _install_and_prove(loaded, plan, replacements, out, texts)


def _install_and_prove(
    loaded: LoadedModel, plan: Plan, replacements: list[Replacement], out: Path, texts: list[str]
) -> Proof:
    log.info("saving and proving the checkpoint")
    model = loaded.model
    install_plan(model, plan, replacements)
    save_checkpoint(model, loaded.tokenizer, out, extra_files=shipped_files(model))
    proof = prove_checkpoint(out, model, loaded.tokenizer, against_text=texts, own_code=needs_code(model))
    proof.raise_if_failed()
    return proof


def _evaluated(
    source: ModelSource,
    recipe: Recipe,
    config: EvaluationConfig,
    plan: Plan,
    out: Path,
    ledger: stages.Ledger,
    windows: dict[str, Windows],
) -> Results:
    path = out / TOOL_FOLDER / "results.json"
    saved = json.loads((out / TOOL_FOLDER / stages.LEDGER_FILE).read_text(encoding="utf-8"))["save"]["key"]
    key = stages.key_of(saved, config.model_dump(mode="json"), windows["evaluation"].provenance["sha256"])
    if ledger.is_done("evaluate", key):
        log.info("results: measured before, taken from %s", path)
        return Results.load(path)
    with ledger.running("evaluate", key):
        log.info("evaluating against the original")
        original = load_model(source, recipe.dtype, recipe.device)
        compressed = load_model(resolve_model(str(out)), "auto", recipe.device)
        held_out = {HELD_OUT: windows["evaluation"]}
        return run_evaluation(
            compressed, original, config, out=path, windows=held_out, command=_command(), plan_hash=plan.digest()
        )


def _finish(out: Path, plan: Plan, recipe: Recipe, base: ModelSource, manifest: dict[str, Any]) -> Path:
    """Report and card, then the manifest, which makes the run a finished one."""
    folder = out / TOOL_FOLDER
    write_text(folder / "plan.json", plan.to_json())
    stages.write_recipe(folder, recipe)
    content = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "plan_hash": plan.digest(),
        "versions": versions(),
        "stage_seconds": stages.Ledger(folder).seconds,
        **manifest,
    }
    report = write_report(out, manifest=content)
    claim(out, ["README.md"])  # once more: what is published since is all that counts as ours
    write_card(out, base_card=_base_card(base))
    write_manifest(out, content)
    return report


# --- small helpers


def _begin_from_plan(
    plan: Plan, model: str, out: str | Path, recipe: Recipe, with_text: bool = True
) -> tuple[ModelSource, LoadedModel]:
    """Load the model of a plan and refuse what does not fit; nothing is written yet."""
    source = resolve_model(model)
    no_wishes = {"target": type(recipe.target)(), "selection": type(recipe.selection)()}  # the plan is the wish
    stages.check_early(source, recipe.model_copy(update=no_wishes), with_text=with_text)
    check_output(out, source=_protected(source))
    loaded = stages.load_original(source, recipe)
    plan.check_fits(stages.model_facts(loaded))
    return source, loaded


@contextmanager
def _opened(path: str | Path, fresh: bool, source: ModelSource) -> Iterator[Path]:
    """The output folder; when the input is refused before any stage is done, what was written is taken back."""
    existed, was_ours = Path(path).expanduser().exists(), (Path(path).expanduser() / TOOL_FOLDER).exists()
    out = open_output(path, fresh=fresh, source=_protected(source))
    try:
        claim(out, ["README.md"])  # refused now rather than at the end, when it is not ours
        yield out
    except StreamlineError as refusal:
        if refusal.exit_code == 2 and not was_ours and not (out / TOOL_FOLDER / stages.LEDGER_FILE).exists():
            withdraw(out, existed=existed)
        raise


def _base_card(source: ModelSource) -> str | None:
    """The original's model card, from which licence and language are inherited."""
    card = source.path / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None


def _preview(loaded: LoadedModel, plan: Plan, recipe: Recipe, statistics: Statistics | None) -> Preview:
    here = versions()
    same_machine = statistics and {k: v for k, v in statistics.info.machine.items() if k in ("platform", "cpus", "gpu")}
    if same_machine and all(here.get(name) == value for name, value in same_machine.items()):
        seconds = statistics.info.layer_seconds_per_token
    else:
        seconds = stages.time_layers(loaded, recipe)
    return preview_plan(loaded.model, model_size(loaded.model), plan, recipe.training, recipe.text.seq_len, seconds)


def _announce(plan: Plan, preview: Preview) -> None:
    log.info("%s", plan.describe())
    if preview.train_seconds:
        log.info("training will take about %.0f minutes here", max(1, preview.train_seconds / 60))


def _draw(statistics: Statistics, folder: Path, plan: Plan | None) -> None:
    chosen = [(edit.start, edit.stop) for edit in plan.edits] if plan else []
    tried = [(c.start, c.stop) for c in plan.selection.candidates] if plan and plan.selection else []
    try:
        write_heatmap_png(statistics.similarity.numpy(), folder / "similarity.png", chosen, tried)
    except MissingExtraError as problem:
        log.info("no similarity.png (the report draws the map itself): %s", problem)


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


def _check_evaluation_text(recipe: Recipe, windows: dict[str, Windows]) -> None:
    for spec in recipe.evaluation.perplexity:
        check_text_unseen(spec, [windows["calibration"], windows["train"], windows["validation"]])


def _found(out: Path, loaded: LoadedModel, recipe: Recipe) -> Outcome:
    folder = out / TOOL_FOLDER
    plan = Plan.load(folder / "plan.json")
    statistics = Statistics.load(folder)
    results = Results.load(folder / "results.json")
    return Outcome(out, plan, _preview(loaded, plan, recipe, statistics), results, None, folder / "report.html")


def _evaluation_wanted(recipe: Recipe, loaded: LoadedModel, windows: dict[str, Windows]) -> EvaluationConfig:
    """The recipe's evaluation; where it names no task, the one made of the held-out text, if that is long enough.

    Raises:
        TextError, TaskError: if a task that the recipe names cannot be made: now, not after the training.
    """
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


def _hashes(windows: dict[str, Windows]) -> dict[str, str]:
    return {role: found.provenance["sha256"] for role, found in windows.items()}


def _protected(source: ModelSource) -> Path | None:
    return source.path if source.path.is_dir() else source.path.parent


def _command() -> str:
    return " ".join(["llm-streamline", *sys.argv[1:]]) if "llm-streamline" in sys.argv[0] else "Python API"
