"""One whole evaluation, readable top to bottom: models in, one record and the per-item logs out."""

import os
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from llm_streamline import ranks
from llm_streamline.data.windows import Windows
from llm_streamline.errors import OutputError, StreamlineError
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.generation import judge_generation
from llm_streamline.evaluation.material import gather
from llm_streamline.evaluation.perplexity import compare_losses, divergence_result
from llm_streamline.evaluation.reference import recall, remember
from llm_streamline.evaluation.result import Comparison, ModelResult, Provenance, Results
from llm_streamline.evaluation.stability import compare_logs
from llm_streamline.evaluation.subject import (
    Clock,
    Subject,
    make_subject,
    measure_generation,
    measure_speed,
    measure_tasks,
    measure_texts,
    name_of,
    speed_setup,
)
from llm_streamline.logs import get_logger
from llm_streamline.output import saving, write_text
from llm_streamline.runtime import num_threads, versions
from llm_streamline.sources import LoadedModel

_ORIGINAL = "original"


def evaluate(
    models: LoadedModel | Iterable[LoadedModel],
    original: LoadedModel | None = None,
    config: EvaluationConfig | None = None,
    *,
    out: str | Path | None = None,
    windows: Mapping[str, Windows] | None = None,
    command: str | None = None,
    plan_hash: str | None = None,
    reference: Path | None = None,
) -> Results:
    """Measure models, alone and against an original.

    The same seed gives the same result but for times (`Results.without_times`).

    Args:
        models: the models to judge. Of a generator one is held at a time.
        original: what to compare them with.
        config: what to measure and how.
        out: where to write the results (a .json file); per-item logs go to `items/<model>/` beside it.
        windows: held-out windows of a run, by name; scored beside the texts of the config, and the source of the
            `continuation` task when it names none. They must be of the tokenizer that all models share.
        command: how the user asked for this, for the record.
        plan_hash: hash of the plan that made the model, for the record.
        reference: file that keeps what is measured of the original alone, for the next evaluation against it. Where
            divergence is asked for, the texts are read by both models together every time.

    Raises:
        ConfigError, TextError, TaskError, MissingExtraError: something asked for is not there or cannot be used;
            raised before any model runs.
        NumericsError: a model yields not-a-number; the message names the place.
        OutputError: `out` exists and is not a result file, or cannot be written.
    """
    config = config or EvaluationConfig()
    started, clock = datetime.now(UTC), Clock()
    out = None if out is None else ranks.from_main(lambda: _check_out(Path(out)))
    queue = iter([models] if isinstance(models, LoadedModel) else models)
    loaded = next(queue, None)
    if loaded is None:
        raise StreamlineError("no model to evaluate.")
    place = {"device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch.")}
    material = ranks.from_main(lambda: gather(config, loaded.tokenizer, windows))
    base = make_subject(_ORIGINAL, original, material) if original is not None else None
    if base is not None:
        is_known = recall(reference, base, material)
        if not is_known:
            measure_tasks(base, material, clock)
            measure_generation(base, config, clock)
    results: list[ModelResult] = []
    comparisons: list[Comparison] = []
    logs: dict[str, str] = {}
    hashes: dict[str, str] = {}
    while loaded is not None:
        taken = {result.name for result in results} | {_ORIGINAL}
        subject = make_subject(name_of(loaded, taken), loaded, material)
        setup = speed_setup([subject] if base is None else [subject, base], config)
        pair_texts = measure_texts(subject, base, config, clock)
        measure_tasks(subject, material, clock)
        measure_generation(subject, config, clock)
        speed, base_speed, speed_pair = measure_speed(subject, base, setup, clock)
        if base is not None:
            if not any(result.role == _ORIGINAL for result in results):
                if not is_known:
                    remember(reference, base, material)
                results.append(_model_result(base, _ORIGINAL, base_speed))
                logs |= base.logs
            comparisons.append(_comparison(base, subject, pair_texts, speed_pair, config, clock))
        results.append(_model_result(subject, "model", speed))
        logs |= subject.logs
        hashes |= {part.name: part.data_hash for part in (*subject.texts, *subject.tasks)}
        subject = loaded = None  # let go of this model before the next one is loaded
        loaded = next(queue, None)
    record = Results(
        models=tuple(results),
        comparisons=tuple(comparisons),
        provenance=_provenance(config, place, hashes, material, started, clock, command, plan_hash),
    )
    if out is not None:
        ranks.from_main(lambda: _write(record, logs, out))
    return ranks.from_main(lambda: record)  # times differ from rank to rank


def _comparison(base, subject, pair_texts, speed_pair, config: EvaluationConfig, clock: Clock) -> Comparison:
    with clock.stage("stability"):
        stability, averages = (), ()
        if base.answers:
            stability, averages = compare_logs(
                base.answers, subject.answers, sigma=config.sigma, bootstrap=config.bootstrap, seed=config.seed
            )
    same = [text.name for text in subject.texts if text.name in pair_texts["same"]]
    if len(same) < len(subject.texts):
        get_logger().warning("%s and the original differ in tokenizer: no divergence between them", subject.name)
    return Comparison(
        original=base.name,
        model=subject.name,
        perplexity=tuple(compare_losses(name, base.losses[name], subject.losses[name]) for name in same),
        divergence=tuple(divergence_result(name, found) for name, found in pair_texts["divergences"].items()),
        stability=stability,
        stability_averages=averages,
        generation=judge_generation(base.generation, subject.generation) if config.generation else None,
        speed=speed_pair,
    )


def _model_result(subject: Subject, role: str, speed) -> ModelResult:
    source = subject.loaded.source
    return ModelResult(
        name=subject.name,
        role=role,
        source=str(source.spec),
        kind=source.kind,
        revision=source.revision,
        fingerprint=source.fingerprint,
        model_type=subject.model.config.model_type,
        size=subject.size,
        perplexity=subject.perplexity,
        tasks=subject.tasks,
        generation=subject.generation,
        speed=speed,
    )


def _provenance(config, place, hashes, material, started, clock, command, plan_hash) -> Provenance:
    return Provenance(
        versions=versions() | material.harness_version,
        seed=config.seed,
        **place,
        threads=num_threads(),
        command=command,
        config=config.model_dump(mode="json"),
        data_hashes=hashes,
        plan_hash=plan_hash,
        started_at=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock.start,
        stage_seconds=clock.stages,
    )


def _check_out(path: Path) -> Path:
    """Refuse to overwrite what is not a result file of ours, and a place where nothing can be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name the result file, such as {path / 'results.json'}.")
    if path.exists():
        try:
            Results.load(path)
        except StreamlineError:
            raise OutputError(f"{path} exists and is no result file of ours; choose another name.") from None
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OutputError(f"{path} cannot be written: {place} is not a writable folder.")
    return path


def _write(record: Results, logs: Mapping[str, str], out: Path) -> None:
    """Write per-item logs, then the result file that names them; logs that an earlier run left there go."""
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            for model in Results.load(out).models:
                for task in model.tasks:
                    if task.items_file and task.items_file not in logs:
                        (out.parent / task.items_file).unlink(missing_ok=True)
        for name, content in logs.items():
            (out.parent / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(out.parent / name, content)
        write_text(out, record.model_dump_json(indent=2) + "\n")


def gate_failures(results: Results) -> tuple[str, ...]:
    """Return a sentence for every model that fails the generation check; none: the gate is passed."""
    return tuple(
        f"{pair.model}: {' '.join(pair.generation.reasons)}"
        for pair in results.comparisons
        if pair.generation is not None and not pair.generation.ok
    )
