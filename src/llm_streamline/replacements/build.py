"""From a plan's edits to replacement networks, and from trained networks to an edited model."""

from typing import Any

import torch
from torch import nn

from llm_streamline.arch import find_arch, get_layers, mlp_facts
from llm_streamline.offload import bring_home
from llm_streamline.plan import Plan, Replace
from llm_streamline.replacements.base import Replacement
from llm_streamline.replacements.layer import LayerReplacement, SilencedLayerReplacement
from llm_streamline.replacements.linear import LinearReplacement
from llm_streamline.replacements.mlp import MlpReplacement
from llm_streamline.replacements.stream import StreamReplacement
from llm_streamline.spread import follow_weights, is_spread
from llm_streamline.surgery import apply_plan


def build_replacements(model: nn.Module, plan: Plan) -> list[Replacement]:
    """One network for each Replace of the plan, with the weights of its template layers; `starts.py` sets the start.

    Raises:
        ArchitectureError: if this architecture cannot hold such a network; the message says why and what can.
    """
    return [_build(model, plan, edit) for edit in plan.edits if isinstance(edit, Replace)]


def _build(model: nn.Module, plan: Plan, edit: Replace) -> Replacement:
    arch, network = find_arch(model), edit.network
    if network.kind == "layer":
        return LayerReplacement(model, plan, edit, arch)
    if network.kind == "linear":
        return LinearReplacement(model, plan, edit, arch)
    if network.follows_a_layer:
        return StreamReplacement(model, plan, edit, arch)
    facts = mlp_facts(get_layers(model)[edit.templates[0]], arch)
    own_mlp = facts.kind == ("gated" if network.kind == "swiglu" else "plain")
    own_shape = network.width in (None, facts.width) and network.activation in (None, facts.activation)
    if own_mlp and own_shape and network.residual and arch.identity_obstacle is None:
        return SilencedLayerReplacement(model, plan, edit, arch)
    return MlpReplacement(model, plan, edit, arch)


@torch.no_grad()
def install_plan(model: nn.Module, plan: Plan, replacements: list[Replacement], healed: Any = None) -> None:
    """Edit `model` in place: the structure by the plan, then the trained networks' weights.

    Args:
        model: the original.
        plan: what is done to it.
        replacements: the plan's networks.
        healed: `training.heal.Healed`, the original's own weights that were trained beside them; None: none.
    """
    spread = is_spread(model)
    apply_plan(model, plan)
    for replacement in replacements:
        for layer in get_layers(model)[replacement.resume_at : replacement.out]:
            bring_home(layer)  # what is on disk cannot be written to
    ordered = sorted(replacements, key=lambda replacement: replacement.install_order)
    for replacement in (r for r in ordered if r.install_order == 0):
        replacement.install(model)
    if healed is not None:
        healed.install(model)
    for replacement in (r for r in ordered if r.install_order > 0):
        replacement.install(model)
    for layer in get_layers(model) if spread else ():
        follow_weights(layer)
