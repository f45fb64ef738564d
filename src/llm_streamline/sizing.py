"""From a target to the number of layers that leave. Plain numbers, no torch. Letters: L layers.

LLM-Streamline counts in several ways (specifications: llm-streamline 2.3): its code removes n = k + 1 layers and puts
one back, its FFN row removes n and adds a network. Here the count is an option, and what it means is always printed.
All other targets are a limit on something that each layer takes a part of: parameters, bytes of weights or of cache,
seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llm_streamline.config import Target
from llm_streamline.errors import ConfigError, PlanError
from llm_streamline.plan import Network, Plan
from llm_streamline.sizes import as_size

DEFAULT_SHARE = 0.25  # of the layers, when no target is given: the paper's usual setting
_OTHER_LIMITS = ("memory", "kv_cache", "latency")


@dataclass(frozen=True)
class Cost:
    """What a model takes of something, and how much of it each of its L layers takes, in the same unit."""

    total: float
    layers: tuple[float, ...]

    def after(self, plan: Plan) -> float:
        """What is taken by the model that `plan` leaves; a layer put back counts as its template."""
        return self.total - sum(self.layers) + sum(self.layers[source] for source in plan.layer_sources())


@dataclass(frozen=True)
class Decided:
    """How many layers leave, and how that was counted."""

    num_removed: int
    target: str  # the user's wish in words
    convention: str  # how it was counted
    cost: Cost | None = None  # what is limited, where layers may differ in it
    limit: float = math.inf

    def is_met_by(self, plan: Plan) -> bool:
        """Whether the layers that `plan` removes are large enough; they may be smaller than the mean layer.

        A plan that takes no layer out (it silences sublayers, say) is not held against the limit.
        """
        if self.cost is None or plan.num_layers_after == plan.model.num_layers:
            return True
        return self.cost.after(plan) <= self.limit * (1 + 1e-9)

    def one_more(self, added: int) -> "Decided":
        """The next larger number of layers, where the smaller one missed the limit.

        Raises:
            PlanError: if no layer would be left.
        """
        removed = self.num_removed + 1
        if removed > len(self.cost.layers) - (0 if added else 1):
            raise PlanError(f"no {removed - 1} layers that this method chooses meet the target ({self.target})")
        note = f"{self.convention}; {removed}, because the layers chosen are smaller than the mean"
        return replace(self, num_removed=removed, convention=self.convention if "because" in self.convention else note)


def decide_size(
    target: Target,
    network: Network | None,
    layer_parameters: list[int],
    total_parameters: int,
    costs: Mapping[str, Cost] | None = None,
) -> Decided:
    """Turn a target into a number of layers.

    Args:
        target: what the user asked for.
        network: what is put back; None for nothing.
        layer_parameters: parameters of each layer, in order.
        total_parameters: of the whole model, tied weights once.
        costs: what the model takes of that which the target limits, where it is `memory` (bytes), `kv_cache` (bytes, at
            the context the target names) or `latency` (seconds).

    Raises:
        PlanError: if the target would remove no layer, or leave none; the message says what is possible.
        ConfigError: if such a target is given and its cost is not.
    """
    added = network.num_layers_added if network else 0
    if target.limited is None:
        return _by_count(target, added, len(layer_parameters), layer_parameters, total_parameters)
    if target.limited in _OTHER_LIMITS:
        if target.limited not in (costs or {}):
            raise ConfigError(
                f"a target by {target.limited} is decided on the model itself; here use layers, sparsity or params"
            )
        cost = costs[target.limited]
    else:
        cost = Cost(total_parameters, tuple(layer_parameters))
    return _by_limit(target, cost, added)


def _by_count(target: Target, added: int, num_layers: int, layers: list[int], total: int) -> Decided:
    wish = target.layers or max(1, round(DEFAULT_SHARE * num_layers))
    words = f"{wish} layers fewer" if target.layers else f"a quarter of {num_layers} layers: {wish} fewer"
    removed = wish + added if target.count == "net" else wish
    if target.count == "net":
        convention = f"net: {removed} layers leave, {added} come back, {num_layers - wish} remain"
    else:
        words = f"{wish} layers removed"
        convention = f"removed: {removed} layers leave, {added} come on top, {num_layers - wish + added} remain"
    most = num_layers - max(added, 1)
    share = sum(layers) / num_layers / total
    possible = f"at most {most} layers or {most * share:.1%} of its parameters can go"
    _check(removed, added, num_layers, words, possible)
    return Decided(removed, words, convention)


def _by_limit(target: Target, cost: Cost, added: int) -> Decided:
    num_layers, kind = len(cost.layers), target.limited
    mean = sum(cost.layers) / num_layers
    if mean <= 0:
        raise PlanError(f"the layers of this model take nothing of what the target limits ({kind}); use another target")
    limit = _limit(target, cost)
    words, of = _words(target, cost), _UNITS[kind]
    if limit >= cost.total:
        raise PlanError(
            f"the target ({words}) is no smaller than the model's {of(cost.total)}; nothing would be removed"
        )
    removed = math.ceil((cost.total - limit + added * mean) / mean - 1e-9)
    convention = (
        f"smallest number of layers with {of(cost.total)} - ({removed} removed - {added} put back) x {of(mean)} a "
        f"layer <= {of(limit)}"
    )
    most = num_layers - max(added, 1)
    possible = f"at most {most} layers can go, which leaves {of(cost.total - most * mean)}"
    if kind in ("sparsity", "params"):
        possible = f"at most {most} layers or {most * mean / cost.total:.1%} of its parameters can go"
    _check(removed, added, num_layers, words, possible)
    return Decided(removed, words, convention, None if kind == "latency" else cost, limit)


def _limit(target: Target, cost: Cost) -> float:
    if target.limited == "sparsity":
        return (1 - target.sparsity) * cost.total
    if target.limited == "latency":
        return target.latency * cost.total
    return {"params": target.params, "memory": target.memory, "kv_cache": target.kv_bytes}[target.limited]


def _words(target: Target, cost: Cost) -> str:
    if target.limited == "sparsity":
        return f"{target.sparsity:.1%} of all parameters fewer"
    if target.limited == "latency":
        return f"at most {target.latency:g}x the original's latency"
    if target.limited == "memory":
        return f"at most {_bytes(target.memory)} of weights"
    if target.limited == "kv_cache":
        where = f"at {target.kv_context:,} tokens" if target.kv_context else "a token"
        return f"at most {_bytes(target.kv_bytes)} of KV cache {where}"
    return f"at most {target.params:,} parameters"


def _bytes(value: float) -> str:
    return f"{value:,.0f} bytes" if value < 10 * 2**20 else as_size(value)


_UNITS = {
    "sparsity": lambda value: f"{value:,.0f} parameters",
    "params": lambda value: f"{value:,.0f}",
    "memory": _bytes,
    "kv_cache": _bytes,
    "latency": lambda value: f"{1e3 * value:.3g} ms",
}


def _check(removed: int, added: int, num_layers: int, words: str, possible: str) -> None:
    if removed - added < 1:
        raise PlanError(
            f"the target ({words}) removes {removed} layer(s) and puts {added} back, so nothing would become smaller; "
            f"remove at least {added + 1}"
        )
    if removed >= num_layers + (1 if added else 0) or num_layers - removed + added < 1:
        raise PlanError(
            f"the target ({words}) needs {removed} layers to leave, but the model has only {num_layers}; {possible}"
        )
