"""From a target (layers, sparsity, parameters) to the number of layers that leave. Plain numbers, no torch.

LLM-Streamline counts in several ways (specifications: llm-streamline 2.3): its code removes n = k + 1 layers and puts
one back, its FFN row removes n and adds a network. Here the count is an option, and what it means is always printed.
"""

import math
from dataclasses import dataclass

from llm_streamline.config import Target
from llm_streamline.errors import PlanError
from llm_streamline.plan import Network

DEFAULT_SHARE = 0.25  # of the layers, when no target is given: the paper's usual setting


@dataclass(frozen=True)
class Decided:
    """How many layers leave, and how that was counted."""

    num_removed: int
    target: str  # the user's wish in words
    convention: str  # how it was counted


def decide_size(target: Target, network: Network | None, layer_parameters: list[int], total_parameters: int) -> Decided:
    """Turn a target into a number of layers.

    Args:
        target: what the user asked for.
        network: what is put back; None for nothing.
        layer_parameters: parameters of each layer, in order.
        total_parameters: of the whole model, tied weights once.

    Raises:
        PlanError: if the target would remove no layer, or leave none.
    """
    num_layers = len(layer_parameters)
    added = network.num_layers_added if network else 0
    mean_layer = sum(layer_parameters) / num_layers
    if target.sparsity is None and target.params is None:
        wish = target.layers or max(1, round(DEFAULT_SHARE * num_layers))
        words = f"{wish} layers fewer" if target.layers else f"a quarter of {num_layers} layers: {wish} fewer"
        removed = wish + added if target.count == "net" else wish
        if target.count == "net":
            convention = f"net: {removed} layers leave, {added} come back, {num_layers - wish} remain"
        else:
            words = f"{wish} layers removed"
            convention = f"removed: {removed} layers leave, {added} come on top, {num_layers - wish + added} remain"
    else:
        share = target.sparsity if target.sparsity is not None else 1 - target.params / total_parameters
        if share <= 0:
            raise PlanError(
                f"the target of {target.params:,} parameters is no smaller than the model's {total_parameters:,}; "
                "nothing would be removed"
            )
        words = (
            f"{share:.1%} of all parameters fewer"
            if target.sparsity is not None
            else f"at most {target.params:,} parameters"
        )
        removed = math.ceil((share * total_parameters + added * mean_layer) / mean_layer - 1e-9)
        convention = (
            f"smallest number of layers with ({removed} removed - {added} put back) x {mean_layer:,.0f} parameters "
            f"/ {total_parameters:,} >= {share:.4f}"
        )
    _check(removed, added, num_layers, words, mean_layer / total_parameters)
    return Decided(removed, words, convention)


def _check(removed: int, added: int, num_layers: int, words: str, layer_share: float) -> None:
    if removed - added < 1:
        raise PlanError(
            f"the target ({words}) removes {removed} layer(s) and puts {added} back, so nothing would become smaller; "
            f"remove at least {added + 1}"
        )
    if removed >= num_layers + (1 if added else 0) or num_layers - removed + added < 1:
        most = num_layers - max(added, 1)
        raise PlanError(
            f"the target ({words}) needs {removed} layers to leave, but the model has only {num_layers}; "
            f"at most {most} layers or {most * layer_share:.1%} of its parameters can go"
        )
