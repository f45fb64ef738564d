"""The edited model of a plan as a view on the original: nothing is copied but what the plan makes new."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_streamline.arch import ArchSpec, find_arch, get_layers, silencing
from llm_streamline.measure.partial import ResumedModel
from llm_streamline.merging import merged_layers
from llm_streamline.plan import Part, Plan
from llm_streamline.replacements.base import Replacement
from llm_streamline.silencing import silences
from llm_streamline.surgery import shallow_copy


class SilentLayers:
    """Layers with one sublayer silent, each made once: plans that silence the same one share the module.

    Such a layer shares every weight with the original's but those that are constant, which all layers share.
    """

    def __init__(self) -> None:
        self._layers: dict[tuple[int, str], nn.Module] = {}  # (original layer, part)
        self._constants: dict[tuple, nn.Parameter] = {}  # (shape, dtype, device, value)

    def layer(self, model: PreTrainedModel, index: int, part: Part) -> nn.Module:
        """Layer `index` of the original without its attention or MLP; the original is left as it is."""
        if (index, part) not in self._layers:
            self._layers[index, part] = self._make(get_layers(model)[index], find_arch(model), part)
        return self._layers[index, part]

    def _make(self, layer: nn.Module, arch: ArchSpec, part: Part) -> nn.Module:
        clone = shallow_copy(layer)
        copied = {"": clone}
        for name, value in silencing(layer, arch, part).items():
            way = ""
            for step in name.split(".")[:-1]:
                owner, way = way, f"{way}.{step}".lstrip(".")
                if way not in copied:
                    copied[way] = copied[owner]._modules[step] = shallow_copy(copied[owner]._modules[step])
            copied[way]._parameters[name.rpartition(".")[2]] = self._constant(layer.get_parameter(name), value)
        return clone

    def _constant(self, like: nn.Parameter, value: float) -> nn.Parameter:
        key = (like.shape, like.dtype, like.device, value)
        if key not in self._constants:
            self._constants[key] = nn.Parameter(torch.full_like(like, value), requires_grad=False)
        return self._constants[key]


def plan_patches(
    model: nn.Module,
    plan: Plan,
    replacements: Sequence[Replacement],
    dtype: torch.dtype | None = None,
    silent: SilentLayers | None = None,
) -> dict[int, nn.Module]:
    """What stands in the edited model beside the original's own layers, by place: merged and silenced layers, networks.

    Args:
        model: the original, left as it is.
        plan: what is done to it.
        replacements: the plan's networks, as `build_replacements` gives them.
        dtype: cast the networks to it, in place; None leaves them as they are.
        silent: where silenced layers are kept for other plans; None makes them for this one alone.
    """
    networks = {place: module for r in replacements for place, module in r.patches().items()}
    if dtype is not None:
        networks = {place: module.to(dtype) for place, module in networks.items()}
    return merged_layers(model, plan) | silenced_layers(model, plan, silent or SilentLayers()) | networks


def edited_view(model: nn.Module, plan: Plan, replacements: Sequence[Replacement]) -> ResumedModel:
    """The model that `plan` (with at least one edit) asks for, to be resumed where it first differs from `model`."""
    at = min([edit.start for edit in plan.edits] + [r.resume_at for r in replacements])
    return ResumedModel(model, plan.layer_sources(), at, plan_patches(model, plan, replacements))


def silenced_layers(model: PreTrainedModel, plan: Plan, silent: SilentLayers) -> dict[int, nn.Module]:
    """Place in the edited model -> layer with its sublayer silent, for every layer that the plan silences."""
    return {
        plan.position_of(edit) + offset: silent.layer(model, index, edit.part)
        for edit in silences(model, plan)
        for offset, index in enumerate(edit.templates)
    }
