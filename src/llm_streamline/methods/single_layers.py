"""Methods that score every layer by itself and remove the lowest ones at once: their metrics, and the plan."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import block_influence, bootstrap_mean_difference, bootstrap_ranks
from llm_streamline.methods.choosing import first_together, layers_plan, sound
from llm_streamline.plan import Margin, Plan, Selection

Metric = Literal["random", "tail", "magnitude_l1", "magnitude_l2", "taylor", "ppl", "bi"]


@dataclass(frozen=True)
class LayerScores:
    """A score for each layer that may leave; low is removed first."""

    name: str
    values: dict[int, float]
    by_window: Tensor | None = None  # (W, layers in the order of `values`): what the values are means over
    is_loss: bool = False  # held-out loss, in nats a token


def score_layers(probe: Probe, metric: Metric, layers: Sequence[int], gradient_tokens: int) -> LayerScores:
    """Score `layers` by one of the metrics compared in Reassessing (arXiv:2411.15558).

    Args:
        probe: the model.
        metric: its name.
        layers: those that may leave.
        gradient_tokens: calibration tokens that `taylor` is measured on.

    Raises:
        ArchitectureError: if the metric needs weights that are not in memory.
    """
    if metric == "random":
        drawn = random.Random(probe.seed).sample(list(layers), len(layers))
        return LayerScores("place in a random order", {layer: float(place) for place, layer in enumerate(drawn)})
    if metric == "tail":
        return LayerScores("layers above it", {layer: float(probe.facts.num_layers - 1 - layer) for layer in layers})
    if metric == "bi":
        influence = block_influence(probe.statistics().similarity).tolist()
        return LayerScores("Block Influence", {layer: influence[layer] for layer in layers})
    if metric == "ppl":
        return _losses(probe, layers)
    if metric == "taylor":
        by_window = probe.taylor(gradient_tokens)[:, list(layers)]
        values = dict(zip(layers, by_window.mean(0).tolist(), strict=True))
        return LayerScores("sum of |w dL/dw|", values, by_window)
    power = int(metric[-1])
    sums = probe.magnitudes(power).tolist()
    return LayerScores("sum of |w|" if power == 1 else "sum of w²", {layer: sums[layer] for layer in layers})


def _losses(probe: Probe, layers: Sequence[int]) -> LayerScores:
    plans = [layers_plan(probe.facts, [layer]) for layer in layers]
    good = sound(probe, plans)
    losses = torch.stack(probe.losses_of([plans[index] for index in good]), dim=1)  # (W, layers)
    values = dict(zip((layers[index] for index in good), losses.mean(0).tolist(), strict=True))
    return LayerScores("held-out loss without it", values, losses, True)


def ranked_layers(scores: dict[int, float]) -> list[int]:
    """Layers by ascending score; of equal scores the deeper layer is first."""
    return sorted(scores, key=lambda layer: (scores[layer], -layer))


def first_possible(probe: Probe, ranked: Sequence[int], count: int) -> list[int]:
    """The first `count` of ranked layers that this architecture can lose together; see `choosing.first_together`."""
    return first_together(probe, ranked, count, lambda layers: layers_plan(probe.facts, layers), "layers")


def remove_lowest(probe: Probe, scores: LayerScores, count: int, method: str, notes: Sequence[str] = ()) -> Plan:
    """The plan that removes the `count` lowest layers at once; of equal scores the deeper layer is taken.

    A layer whose removal beside the lower ones this architecture cannot hold is passed over.

    Raises:
        PlanError: if fewer than `count` can be removed.
    """
    ranked = ranked_layers(scores.values)
    chosen = first_possible(probe, ranked, count)
    kept = next((layer for layer in ranked if layer not in chosen), None)
    selection = Selection(
        method=method,
        target="",
        convention="",
        order=tuple(chosen),
        margin=_margin(scores, chosen[-1], kept, probe.seed),
        notes=(*notes, *_lines(scores, chosen, probe.seed)),
    )
    return layers_plan(probe.facts, chosen).model_copy(update={"selection": selection})


def _lines(scores: LayerScores, chosen: Sequence[int], seed: int) -> list[str]:
    """A line for each layer removed: its score and, where windows can be drawn again, the ranks it may have had."""
    ranks: dict[int, tuple[int, int]] = {}
    if scores.by_window is not None and len(scores.by_window) > 1:
        ranks = dict(zip(scores.values, bootstrap_ranks(scores.by_window, seed), strict=True))
    lines = []
    for layer in chosen:
        line = f"layer {layer}: {scores.name} {scores.values[layer]:.5g}"
        if scores.is_loss:
            line += f" (perplexity {math.exp(min(scores.values[layer], 50)):.2f})"
        if layer in ranks:
            low, high = ranks[layer]
            line += f", rank {low} of {len(ranks)}" if low == high else f", rank {low} to {high} of {len(ranks)}"
        lines.append(line)
    return lines


def _margin(scores: LayerScores, last: int, kept: int | None, seed: int) -> Margin | None:
    """How much lower the last layer removed is than the first one kept."""
    if kept is None or scores.by_window is None:
        return None
    column = {layer: place for place, layer in enumerate(scores.values)}
    values = scores.by_window
    weights = torch.ones(len(values), dtype=torch.float64)
    difference, low, high = bootstrap_mean_difference(values[:, column[kept]], values[:, column[last]], weights, seed)
    quantity = "heldout_loss" if scores.is_loss else scores.name
    return Margin(quantity=quantity, difference=difference, low=low, high=high, num_blocks=len(values))
