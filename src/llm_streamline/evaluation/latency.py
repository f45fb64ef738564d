"""Latency as a target: how long one generated token takes on this machine, and which part of that is a layer's.

Seconds of one decode step, batch of one, after a short prompt. The original is timed in turns with itself cut to fewer
layers (a tail cut, which shares every weight and needs no new cache), so that a drifting machine meets both.
"""

import statistics
from dataclasses import dataclass

from torch import nn

from llm_streamline.arch import get_layers
from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.evaluation.speed import SpeedSetup, time_in_turns
from llm_streamline.memory_limits import told_in_a_sentence
from llm_streamline.sizing import Cost, Decided
from llm_streamline.surgery import shared_view

SETUP = SpeedSetup(prompt_tokens=64, new_tokens=8, rounds=5)
_MOST_TRIALS = 4  # candidates measured; each differs from the last by the layers that its measurement asked for


@dataclass(frozen=True)
class LatencyRatio:
    """One generated token's time in a candidate by that in the original, over rounds in turns."""

    ratio: float
    low: float  # first quartile
    high: float  # third quartile
    seconds: tuple[float, float]  # medians: original, candidate


def latency_cost(model: nn.Module) -> Cost:
    """Seconds of one generated token, and the part that each layer takes; the rest is embedding, norm and head.

    Raises:
        PlanError: if no cut of the model can be run, or fewer layers are not faster here.
    """
    num_layers = len(get_layers(model))
    cut = _largest_cut(model, max(1, num_layers // 2))
    measured = latency_ratio(model, cut)
    whole, part = measured.seconds
    layer = (whole - part) / (num_layers - cut)
    if layer <= 0:
        raise PlanError(
            f"on this machine {cut} of {num_layers} layers take no less time a token than all ({1e3 * part:.3g} ms and "
            f"{1e3 * whole:.3g} ms), so latency cannot be a target; is it busy? Use --layers"
        )
    return Cost(whole, (layer,) * num_layers)


def latency_ratio(model: nn.Module, num_layers: int, setup: SpeedSetup = SETUP) -> LatencyRatio:
    """Time the model's first `num_layers` layers in turns with all of them.

    Raises:
        OutOfMemoryError: one sequence does not fit.
    """
    with told_in_a_sentence("measuring latency", "give the target in layers (--layers)", can_stream=False):
        whole, part = time_in_turns([model, shared_view(model, range(num_layers))], setup)
    ratios = [after / before for before, after in zip(whole.decode, part.decode, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    seconds = statistics.median(whole.decode), statistics.median(part.decode)
    return LatencyRatio(statistics.median(ratios), low, high, seconds)


def confirm_latency(model: nn.Module, decided: Decided, added: int, wish: float) -> Decided:
    """Measure what was calculated, and remove more layers where the measured ratio misses the wish.

    Args:
        model: the original.
        decided: from `decide_size`.
        added: layers put back.
        wish: largest ratio to the original's latency.

    Raises:
        PlanError: if the wish is not met by any number of layers that can go; the message names what was reached.
    """
    num_layers, removed = len(get_layers(model)), decided.num_removed
    for _ in range(_MOST_TRIALS):
        kept = _largest_cut(model, num_layers - removed + added)
        measured = latency_ratio(model, kept)
        if measured.ratio <= wish:
            return Decided(removed, decided.target, f"{decided.convention}; {_found(measured, kept, num_layers)}")
        missing = max(1, round((measured.ratio - wish) / max(1 - measured.ratio, 0.05) * (num_layers - kept)))
        if removed + missing - added > num_layers - max(added, 1):
            break
        removed += missing
    raise PlanError(f"the target ({decided.target}) is not reached: {_found(measured, kept, num_layers)}")


def _found(measured: LatencyRatio, kept: int, num_layers: int) -> str:
    before, after = (1e3 * seconds for seconds in measured.seconds)
    return (
        f"{kept} of {num_layers} layers measured at {measured.ratio:.3f}x ({measured.low:.3f}-{measured.high:.3f}), "
        f"{after:.3g} of {before:.3g} ms a generated token on this machine, one sequence after "
        f"{SETUP.prompt_tokens} tokens"
    )


def _largest_cut(model: nn.Module, num_layers: int) -> int:
    """`num_layers`, or the next number of first layers that this family can be cut to."""
    for kept in range(num_layers, len(get_layers(model))):
        try:
            shared_view(model, range(kept))
        except ArchitectureError:
            continue
        return kept
    raise PlanError("this model cannot be run with fewer layers, so latency cannot be a target; use --layers")
