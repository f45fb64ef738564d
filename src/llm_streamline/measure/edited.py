"""The edited model of a plan as a view on the original: nothing is copied but what the plan makes new."""

from collections.abc import Sequence

import torch
from torch import nn

from llm_streamline.measure.partial import ResumedModel
from llm_streamline.merging import merged_layers
from llm_streamline.plan import Plan
from llm_streamline.replacements.base import Replacement


def plan_patches(
    model: nn.Module, plan: Plan, replacements: Sequence[Replacement], dtype: torch.dtype | None = None
) -> dict[int, nn.Module]:
    """What stands in the edited model beside the original's own layers, by place: merged layers and networks.

    Args:
        model: the original, left as it is.
        plan: what is done to it.
        replacements: the plan's networks, as `build_replacements` gives them.
        dtype: cast the networks to it, in place; None leaves them as they are.
    """
    networks = {place: module for r in replacements for place, module in r.patches().items()}
    if dtype is not None:
        networks = {place: module.to(dtype) for place, module in networks.items()}
    return merged_layers(model, plan) | networks


def edited_view(model: nn.Module, plan: Plan, replacements: Sequence[Replacement]) -> ResumedModel:
    """The model that `plan` (with at least one edit) asks for, to be resumed where it first differs from `model`."""
    at = min([edit.start for edit in plan.edits] + [r.resume_at for r in replacements])
    return ResumedModel(model, plan.layer_sources(), at, plan_patches(model, plan, replacements))
