"""What a run within a limit of memory will take, said before the slow work: peak by arithmetic, time by a measurement.

The unit of time is one decoder layer's forward over one token, measured here on two layers. A pass whose layers come
from disk takes the longer of reading and computing, because the next layer is fetched while one runs. What is not known
before the text is read, such as the tokens of a question, is a stated figure.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_streamline.config import Recipe
from llm_streamline.estimates.budget import Fit, ModelBytes
from llm_streamline.estimates.saving import (
    DiskRates,
    ProofWork,
    SavingTime,
    disk_rates,
    proof_work,
    saving_time,
    step_seconds,
)
from llm_streamline.evaluation.passages import NUM_ITEMS
from llm_streamline.logs import get_logger
from llm_streamline.measure.partial import run_tapped
from llm_streamline.plan import Network
from llm_streamline.sizes import as_size
from llm_streamline.sources import LoadedModel, model_folder
from llm_streamline.sources.weights import read_weights

_PROBE_TOKENS = 256
_PROBE_LAYERS = 2
_READ_BYTES = 256 * 2**20
_DOUBLES = 768  # width of the float64 product that is timed
_START_TRIALS = {"layer": 5}  # starts that `best` compares, as a rule: three copies, the identity, the fitted one
_OTHER_TRIALS = 2
_TRIAL_TOKENS = 4_096
_ITEM_TOKENS = 150  # of a question with its choices, the shared context once
log = get_logger()


@dataclass(frozen=True)
class Rates:
    """How fast this machine is on this model."""

    layer_seconds: float  # one layer's forward over one token
    read_bytes_per_second: float
    step_seconds: float  # one layer's forward over a step of three tokens
    double_flops: float  # float64 operations a second, of a matrix product
    disk: DiskRates  # where the result is written


@torch.inference_mode()
def measure_rates(loaded: LoadedModel, out: Path | None = None) -> Rates:
    """Time two layers over one short window, and a read of part of the weight files past the page cache.

    Args:
        loaded: the model.
        out: where a checkpoint will be written; None: nowhere, or it is not known yet.
    """
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=loaded.device)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        states, _ = run_tapped(loaded.model, {"input_ids": ids}, stop=_PROBE_LAYERS)
        float(states[_PROBE_LAYERS].flatten()[0])  # waits for an accelerator
        times.append(time.perf_counter() - started)
    per_token = min(times) / (_PROBE_LAYERS * _PROBE_TOKENS)
    doubles = _double_rate(torch.device("cpu") if loaded.device.type == "mps" else loaded.device)
    return Rates(per_token, _read_rate(loaded), step_seconds(loaded), doubles, disk_rates(out))


def _double_rate(device: torch.device) -> float:
    matrix, times = torch.ones(_DOUBLES, _DOUBLES, dtype=torch.float64, device=device), []
    for _ in range(3):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for an accelerator
        times.append(time.perf_counter() - started)
    return 2 * _DOUBLES**3 / min(times)


def _read_rate(loaded: LoadedModel) -> float:
    path = max(read_weights(model_folder(loaded.source)).files, key=lambda file: file.stat().st_size)
    size = min(_READ_BYTES, path.stat().st_size)
    buffer = memoryview(bytearray(8 * 2**20))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        started, done = time.perf_counter(), 0
        while done < size and (count := file.readinto(buffer)):
            done += count
    return done / max(time.perf_counter() - started, 1e-9)


def pass_seconds(fit: Fit, rates: Rates, num_tokens: int, num_layers: float, batch_tokens: int) -> float:
    """Time of a pass of `num_tokens` through `num_layers` layers, in batches."""
    batches = max(1, -(-num_tokens // batch_tokens))
    reading = batches * fit.model.layer / rates.read_bytes_per_second if fit.layers_on_disk else 0.0
    return num_layers * max(reading, num_tokens * rates.layer_seconds)


def stage_seconds(fit: Fit, rates: Rates, recipe: Recipe, stages: tuple[str, ...]) -> dict[str, float]:
    """Expected wall time of each of the stages; that of saving and proving is `saving_seconds`."""
    model, batch = fit.model, recipe.calibration.batch_tokens
    head, network = _head(model), recipe.replacement.network()
    removed = recipe.target.layers or max(1, model.num_layers // 4)
    start, stop, trained = _expected_span(model, recipe)
    above = model.num_layers - stop
    found: dict[str, float] = {}

    def take(stage: str, num_tokens: int, num_layers: float, batch_tokens: int = batch) -> None:
        if stage in stages:
            found[stage] = found.get(stage, 0.0) + pass_seconds(fit, rates, num_tokens, num_layers, batch_tokens)

    take("measure", recipe.calibration.tokens, model.num_layers)
    if recipe.selection.verify and not recipe.selection.span:
        each = recipe.selection.verify * (above + trained + head)
        take("verify", recipe.selection.verify_tokens, model.num_layers + head + each)
    training = recipe.training
    micro = training.per_device_train_batch_size * recipe.text.seq_len
    if network and recipe.replacement.init == "best":
        tokens = min(_TRIAL_TOKENS, max(training.validation_tokens, recipe.selection.verify_tokens))
        trials = _START_TRIALS.get(network.kind, _OTHER_TRIALS)
        take("start", tokens, trials * (start + trained + above + head))
    if network and recipe.replacement.init in ("best", "closed_form"):
        take("start", recipe.replacement.fit_tokens, stop + trained)
        if "start" in stages:
            found["start"] += _solving_flops(model, network, recipe.replacement.fit_tokens) / rates.double_flops
    if network and training.tokens:
        logits = bool({"lm", "kl"} & training.objective.keys())
        teacher = (
            model.num_layers + head if "kl" in training.objective else stop if "mse" in training.objective else start
        )
        step = teacher + 3 * max(trained, 0.1) + (2 * (above + head) if logits else 0)
        take("train", training.tokens, step, micro)
        check = teacher + start + trained + above + head
        take("train", (training.num_evals + 1) * training.validation_tokens, check, micro)
    evaluation, both = recipe.evaluation, 2 * (model.num_layers + head) - removed
    if evaluation.tokens:
        texts = 1 + len(evaluation.perplexity)  # the run's own held-out text is the first
        take("evaluate", texts * evaluation.tokens, both, evaluation.batch_tokens)
    items = max(1, len(evaluation.tasks)) * (evaluation.limit or NUM_ITEMS)
    take("evaluate", items * _ITEM_TOKENS, both, evaluation.batch_tokens)
    if evaluation.generation and "evaluate" in stages:
        reading = model.layer / rates.read_bytes_per_second if fit.layers_on_disk else 0.0
        steps = evaluation.max_new_tokens * (1 + evaluation.samples)
        found["evaluate"] += steps * both * max(reading, rates.step_seconds)
    return found


def _solving_flops(model: ModelBytes, network: Network, num_tokens: int) -> float:
    """Float64 operations of a closed form: two moments, a Cholesky factorisation, and two products of its size."""
    inputs = model.mlp_width if network.num_layers_added else model.width
    moments = 2 * num_tokens * inputs * (inputs + model.width)
    return moments + inputs**3 / 3 + 4 * inputs**2 * model.width


def saving_seconds(fit: Fit, rates: Rates, recipe: Recipe, work: ProofWork) -> SavingTime:
    """Expected wall time of saving and proving.

    Args:
        fit: the run.
        rates: of this machine.
        recipe: target, span and network decide how large the result is.
        work: of the proof.
    """
    model = fit.model
    start, stop, added = _expected_span(model, recipe)
    kept = model.num_layers - (stop - start) + added
    streamed = kept * model.layer if fit.layers_on_disk else 0
    disk = DiskRates(rates.disk.write, rates.read_bytes_per_second)
    units = kept + _head(model)
    num_bytes = model.rest + kept * model.layer
    return saving_time(num_bytes, units, work, rates.layer_seconds, rates.step_seconds, disk, streamed)


def _head(model: ModelBytes) -> float:
    return model.vocabulary * model.width / model.layer_parameters


def _expected_span(model: ModelBytes, recipe: Recipe) -> tuple[int, int, int]:
    """Start and stop of the span that leaves, in the middle where it is not known yet, and layers put in its place."""
    network = recipe.replacement.network()
    added = network.num_layers_added if network else 0
    if recipe.selection.span:
        return *recipe.selection.span, added
    removed = recipe.target.layers or max(1, model.num_layers // 4)
    start = (model.num_layers - removed) // 2
    return start, start + removed + added, added


def announce(loaded: LoadedModel, fit: Fit, stages: tuple[str, ...], out: Path | None = None) -> dict[str, float]:
    """Say what the run will take: limit, peak, time of each stage. Returns the seconds by stage.

    Args:
        loaded: the model.
        fit: how it was fitted into the limit.
        stages: those that will run.
        out: where the result will be written.
    """
    rates = measure_rates(loaded, out if "save" in stages else None)
    seconds = stage_seconds(fit, rates, fit.recipe, stages)
    if "save" in stages:
        work = proof_work(loaded.model.config, fit.layers_on_disk)
        seconds["save"] = saving_seconds(fit, rates, fit.recipe, work).seconds
    parts = [
        f"{stage} {as_size(fit.peaks[stage])}, {_duration(seconds[stage])}" for stage in stages if stage in seconds
    ]
    log.info(
        "within %s: peak about %s of own memory, about %s, %d tokens at once, %s (%s)",
        as_size(fit.limit),
        as_size(fit.peak),
        _duration(sum(seconds.values())),
        fit.recipe.calibration.batch_tokens,
        "layers stay on disk" if fit.layers_on_disk else "all layers in memory",
        "; ".join(parts),
    )
    return seconds


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
