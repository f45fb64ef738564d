"""What methods share: plans of spans and of single layers, refusals, and the trial of candidates by held-out loss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import bootstrap_mean_difference
from llm_streamline.plan import Margin, ModelFacts, Network, Plan, Remove, Replace, templates_for
from llm_streamline.spans import Span, runs, spans_of_length

T = TypeVar("T")
_MOST_NETWORKS = 8  # candidates' networks in memory at a time


def layers_put_back(network: Network | None) -> int:
    """Entries of the layer list that come back in place of one span."""
    return network.num_layers_added if network else 0


def lowest_start(network: Network | None) -> int:
    """First layer at which a span may start: some networks correct what the layer before it puts out."""
    return 1 if network and network.follows_a_layer else 0


def spans_plan(facts: ModelFacts, network: Network | None, spans: Iterable[Span]) -> Plan:
    """The plan that removes ascending spans, and puts a network of its own in place of each."""
    edits = tuple(
        Remove(start=start, stop=stop)
        if network is None
        else Replace(start=start, stop=stop, network=network, templates=templates_for(network, start, stop))
        for start, stop in spans
    )
    return Plan(model=facts, edits=edits)


def layers_plan(facts: ModelFacts, layers: Iterable[int]) -> Plan:
    """The plan that removes single layers and puts nothing in their place."""
    return spans_plan(facts, None, runs(sorted(layers)))


def refuse_network(method: str, network: Network | None) -> None:
    """Raise ValueError, for a config's validator, when a method of single layers is to put a network back."""
    if network is not None:
        raise ValueError(f"{method} removes single layers and puts nothing in their place; use `--replacement none`")


def require_network(method: str, network: Network | None, kind: str, inits: Sequence[str]) -> None:
    """Raise ValueError, for a config's validator, when a method that is its network is to put another one back."""
    if network is None or network.kind != kind or network.init not in inits:
        got = "nothing" if network is None else f"a {network.kind} with init {network.init}"
        raise ValueError(
            f"{method} puts a {kind} in place of what it removes, started by {' or '.join(inits)}, not {got}; leave "
            f"--replacement out, or set replacement.kind: {kind} and replacement.init: {inits[0]}"
        )


def signed(plan: Plan, method: str) -> Plan:
    """A plan whose choice another method made for this one."""
    return plan.model_copy(update={"selection": plan.selection.model_copy(update={"method": method})})


def unprotected(num_layers: int, num_removed: int, first: int, last: int) -> list[int]:
    """Layers that may leave when the first and last ones are protected.

    Raises:
        PlanError: if they are fewer than are to leave.
    """
    layers = list(range(first, num_layers - last))
    if num_removed > len(layers):
        raise PlanError(
            f"{num_removed} layers are to leave, but with the first {first} and last {last} of {num_layers} protected "
            f"only {len(layers)} may; remove fewer, or lower protect_first and protect_last"
        )
    return layers


def sound(probe: Probe, plans: Sequence[Plan]) -> list[int]:
    """Indices of the plans that this architecture can hold (a hybrid model must keep a layer of each cache kind).

    Raises:
        ArchitectureError: if it can hold none of them.
    """
    reasons = [probe.obstacle(plan) for plan in plans]
    good = [index for index, reason in enumerate(reasons) if reason is None]
    if plans and not good:
        raise ArchitectureError(f"no candidate can be removed: {reasons[0]}")
    return good


def first_together(
    probe: Probe, ranked: Sequence[T], count: int, plan_of: Callable[[list[T]], Plan], name: str
) -> list[T]:
    """The first `count` of what is ranked that this architecture can lose together, in the order of the ranking.

    Args:
        probe: the model.
        ranked: layers or sublayers, the first to leave first.
        count: how many are to leave.
        plan_of: the plan without some of them.
        name: what they are, in the plural, for the message.

    Raises:
        PlanError: if they are fewer.
    """
    chosen: list[T] = []
    for one in ranked:
        if len(chosen) < count and probe.obstacle(plan_of([*chosen, one])) is None:
            chosen.append(one)
    if len(chosen) < count:
        raise PlanError(f"only {len(chosen)} {name} can be removed from this model together; {count} were asked for")
    return chosen


@dataclass(frozen=True)
class Trial:
    """Candidates tried by held-out loss."""

    order: list[int]  # best first; of equal losses, the candidate that came first
    original: Tensor | None  # (W,) nats a token
    losses: list[Tensor | None]  # by candidate
    margin: Margin | None

    def mean(self, index: int) -> float | None:
        """Loss of a candidate, in nats a token; None when it was not tried."""
        return None if self.losses[index] is None else float(self.losses[index].mean())

    @property
    def original_loss(self) -> float | None:
        """Loss of the original on the same windows."""
        return None if self.original is None else float(self.original.mean())


def tried(probe: Probe, plans: Sequence[Plan]) -> Trial:
    """Try all plans together, or in groups where their networks would be many at once: each is a float32 copy."""
    groups = _groups(plans)
    original, losses = probe.losses(groups[0])
    return _ordered(original, [*losses, *(loss for group in groups[1:] for loss in probe.losses_of(group))], probe.seed)


def tried_as_well(probe: Probe, trial: Trial, plans: Sequence[Plan]) -> Trial:
    """The trial of all its candidates and of `plans` behind them."""
    return extended(probe, trial, [loss for group in _groups(plans) for loss in probe.losses_of(group)])


def extended(probe: Probe, trial: Trial, losses: Sequence[Tensor]) -> Trial:
    """The trial of all its candidates and of further ones behind them, whose losses (W,) are known."""
    return _ordered(trial.original, [*trial.losses, *losses], probe.seed)


def _groups(plans: Sequence[Plan]) -> list[list[Plan]]:
    groups: list[list[Plan]] = [[]]
    for plan in plans:
        if sum(isinstance(edit, Replace) for one in (*groups[-1], plan) for edit in one.edits) > _MOST_NETWORKS:
            groups.append([])
        groups[-1].append(plan)
    return groups


def _ordered(original: Tensor | None, losses: list[Tensor], seed: int) -> Trial:
    order = sorted(range(len(losses)), key=lambda i: float(losses[i].mean()))
    margin = loss_margin(losses[order[0]], losses[order[1]], seed) if len(order) > 1 else None
    return Trial(order, original, losses, margin)


def possible_spans(probe: Probe, network: Network | None, length: int) -> list[Span]:
    """Spans of `length` layers that this architecture can lose to the network, or to nothing; shallow first.

    Raises:
        ArchitectureError: if there is none.
    """
    found = [span for span in spans_of_length(length, probe.facts.num_layers) if span[0] >= lowest_start(network)]
    return [found[index] for index in sound(probe, [spans_plan(probe.facts, network, [span]) for span in found])]


def untried(count: int, margin: Margin | None) -> Trial:
    """The first candidate by score, none of them tried."""
    return Trial(list(range(count)), None, [None] * count, margin)


def loss_margin(best: Tensor, second: Tensor, seed: int) -> Margin:
    """How much lower the loss of the best is, paired over windows."""
    difference, low, high = bootstrap_mean_difference(second, best, torch.ones_like(best), seed)
    return Margin(quantity="heldout_loss", difference=difference, low=low, high=high, num_blocks=len(best))
