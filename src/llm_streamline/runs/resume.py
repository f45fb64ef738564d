"""The stages of a run with their ledger: each is taken from the folder when it was done for the same key, else done.

Each works in the run's tool folder, says what it reuses and does again what is damaged; what it does itself is told in
`stages/`.
"""

import json
import time
from pathlib import Path

from llm_streamline import ranks
from llm_streamline.config import Recipe
from llm_streamline.data.windows import Windows
from llm_streamline.errors import MissingExtraError
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.result import Results
from llm_streamline.logs import get_logger
from llm_streamline.measure.files import Statistics
from llm_streamline.output import TOOL_FOLDER, owned_files, write_json, write_text
from llm_streamline.plan import Plan
from llm_streamline.proof import PROOF_FILE, Proof
from llm_streamline.report.card import CARD_FILE
from llm_streamline.report.heatmap import write_heatmap_png
from llm_streamline.runs.folder import WORK_FOLDER
from llm_streamline.runs.ledger import Ledger, key_of
from llm_streamline.sources import LoadedModel, ModelSource
from llm_streamline.stages.decide import decide
from llm_streamline.stages.evaluate import evaluate_both
from llm_streamline.stages.measure import measure
from llm_streamline.stages.original import arithmetic, unpack
from llm_streamline.stages.prove import install_and_prove
from llm_streamline.stages.train import train
from llm_streamline.stages.windows import make_windows

STAGES = ("text", "measure", "plan", "train", "save", "evaluate")  # of `compress`, in their order
log = get_logger()


def prepared(
    loaded: LoadedModel, recipe: Recipe, roles: tuple[str, ...], folder: Path, ledger: Ledger
) -> dict[str, Windows]:
    """The windows of some roles. Each role's are kept under a key of their own, so that only what changed is remade."""
    place = folder / WORK_FOLDER / "windows"
    damaged = ranks.from_main(lambda: ledger.damaged("text"))
    for path in damaged:
        log.warning("%s is damaged or missing: made again", path)
        if ranks.is_main():
            path.unlink(missing_ok=True)
    started = time.perf_counter()
    windows = make_windows(loaded, recipe, roles, place)
    key = key_of(window_hashes(windows))
    if damaged or ledger.key("text") != key:
        with ledger.running("text", key, started) as made:
            made += [place / f"{role}.{suffix}" for role in roles for suffix in ("safetensors", "json")]
    else:
        log.info("windows: made before, taken from %s", place)
    return windows


def measured(loaded: LoadedModel, calibration: Windows, recipe: Recipe, folder: Path, ledger: Ledger) -> Statistics:
    """The similarities of the calibration windows."""
    key = key_of(loaded.source.fingerprint, arithmetic(loaded, recipe), calibration.provenance["sha256"])
    if ledger.is_done("measure", key):
        log.info("similarities: measured before, taken from %s", folder)
        return Statistics.load(folder)
    with ledger.running("measure", key) as made:
        statistics = measure(loaded, calibration, recipe)
        statistics.save(folder)
        made += [folder / "stats.safetensors", folder / "stats.json"]
        _draw(statistics, folder, None)
    return statistics


def decided(
    loaded: LoadedModel,
    recipe: Recipe,
    statistics: Statistics,
    windows: dict[str, Windows],
    folder: Path,
    ledger: Ledger,
) -> Plan:
    """The plan of the recipe, written to plan.json."""
    wishes = recipe.model_dump(mode="json", include={"target", "selection", "replacement", "seed"})
    key = key_of(loaded.source.fingerprint, arithmetic(loaded, recipe), wishes, window_hashes(windows))
    if ledger.is_done("plan", key):
        plan = Plan.load(folder / "plan.json")
        log.info("plan: made before, taken from %s", folder / "plan.json")
        return plan
    with ledger.running("plan", key) as made:
        plan = decide(loaded, recipe, statistics, windows)
        made.append(write_text(folder / "plan.json", plan.to_json()))
        _draw(statistics, folder, plan)
    return plan


def trained_checkpoint(
    loaded: LoadedModel,
    plan: Plan,
    recipe: Recipe,
    windows: dict[str, Windows],
    out: Path,
    ledger: Ledger,
    texts: list[str],
) -> Proof:
    """Train, install, save and prove; a checkpoint that was proven for the same key is left as it is."""
    folder = out / TOOL_FOLDER
    wishes = recipe.model_dump(mode="json", include={"training", "replacement", "seed", "text"})
    texts_seen = window_hashes({role: windows[role] for role in ("train", "validation")})
    key = key_of(plan.digest(), arithmetic(loaded, recipe), wishes, texts_seen)
    if ledger.is_done("save", key):
        log.info("checkpoint: trained and proven before, left as it is")
        data = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
        return Proof.model_validate({name: value for name, value in data.items() if name != "ok"})
    work = folder / WORK_FOLDER / key[:16]  # another key must not go on from these checkpoints
    with ledger.running("train", key) as made:
        trained = train(loaded, plan, recipe, windows, work)
        if trained.history is not None:
            made.append(write_json(folder / "training.json", trained.history))
        elif ranks.is_main():
            (folder / "training.json").unlink(missing_ok=True)
    unpack(loaded, recipe)
    with ledger.running("save", key) as made:
        proof = install_and_prove(loaded, plan, trained, out, texts, recipe.accept_degenerate_text)
        made += [folder / PROOF_FILE, *(out / name for name in owned_files(out) if name != CARD_FILE)]
    return proof


def evaluated(
    source: ModelSource,
    recipe: Recipe,
    config: EvaluationConfig,
    plan: Plan,
    out: Path,
    ledger: Ledger,
    windows: dict[str, Windows],
    *,
    layers_on_disk: bool = False,
) -> Results:
    """The compressed model's results beside those of the original, both loaded from disk."""
    path = out / TOOL_FOLDER / "results.json"
    wishes = config.model_dump(mode="json", exclude={"batch_tokens"})  # how many at once changes no number
    text = windows["evaluation"].provenance["sha256"]
    key = key_of(ledger.key("save"), recipe.attn_implementation, wishes, text)
    if ledger.is_done("evaluate", key):
        log.info("results: measured before, taken from %s", path)
        return Results.load(path)
    with ledger.running("evaluate", key) as made:
        results = evaluate_both(source, recipe, config, plan, out, windows, layers_on_disk=layers_on_disk)
        items = {task.items_file for model in results.models for task in model.tasks if task.items_file}
        made += [path, *(path.parent / name for name in sorted(items))]
    return results


def _draw(statistics: Statistics, folder: Path, plan: Plan | None) -> None:
    chosen = [(edit.start, edit.stop) for edit in plan.edits] if plan else []
    tried = [span for c in plan.selection.candidates for span in c.spans] if plan and plan.selection else []
    if not ranks.is_main():
        return
    try:
        write_heatmap_png(statistics.similarity.numpy(), folder / "similarity.png", chosen, tried)
    except MissingExtraError as problem:
        log.info("no similarity.png (the report draws the map itself): %s", problem)


def window_hashes(windows: dict[str, Windows]) -> dict[str, str]:
    """sha256 of each role's windows."""
    return {role: found.provenance["sha256"] for role, found in windows.items()}
