"""Layers made of layers: one decoder layer whose weights are a linear combination of several (LaCo, arXiv:2402.11187).

What is combined, and with which factors, is data in the plan; this file obeys it and says when it cannot be obeyed.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_streamline.arch import find_arch, get_layers, mlp_facts
from llm_streamline.errors import ArchitectureError
from llm_streamline.plan import Merge, Plan


def merged_layer(model: PreTrainedModel, edit: Merge) -> nn.Module:
    """A new layer with the combined weights, in the model's dtype; `model` is left as it is.

    Sums run in float64 where the device has it, so that merging equal layers with factors that add up to one gives back
    these very weights.

    Args:
        model: the original.
        edit: span and factors.

    Raises:
        ArchitectureError: if the layers of the span cannot be combined; the message says why.
    """
    check_mergeable(model, range(edit.start, edit.stop))
    layers = list(get_layers(model))[edit.start : edit.stop]
    merged = _copy(layers[0])
    norms = norm_parameters(merged)
    sources = [dict(layer.named_parameters()) for layer in layers]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            precise = torch.float64 if parameter.device.type != "mps" else torch.float32
            total = torch.zeros_like(parameter, dtype=precise)
            for factor, source in zip(edit.norms if name in norms else edit.weights, sources, strict=True):
                if factor:
                    total += factor * source[name].to(total)
            parameter.copy_(total)
    return merged


def merged_layers(model: PreTrainedModel, plan: Plan) -> dict[int, nn.Module]:
    """Place in the edited model -> merged layer, for every merge of the plan."""
    return {plan.position_of(edit): merged_layer(model, edit) for edit in plan.edits if isinstance(edit, Merge)}


def check_mergeable(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Refuse layers that cannot be added up.

    Raises:
        ArchitectureError: experts, unlike layers, packed or offloaded weights; the message names the first.
    """
    arch, originals = find_arch(model), get_layers(model)
    first = None
    for index in layers:
        layer = originals[index]
        if mlp_facts(layer, arch).kind == "moe":
            raise ArchitectureError(
                f"layer {index} of this {arch.model_type} is a mixture of experts: the experts of two layers have "
                "nothing in common but their number, so they cannot be merged"
            )
        for name, parameter in layer.named_parameters():
            if parameter.is_meta or not parameter.is_floating_point():
                kind = "offloaded" if parameter.is_meta else "quantised"
                raise ArchitectureError(f"weight {name} of layer {index} is {kind}, so that it cannot be merged")
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        first = first or (index, shapes)
        if shapes != first[1]:
            name = sorted(n for n in first[1].keys() | shapes.keys() if first[1].get(n) != shapes.get(n))[0]
            raise ArchitectureError(
                f"layers {first[0]} and {index} of this {arch.model_type} are not alike ({name}: "
                f"{first[1].get(name, 'none')} and {shapes.get(name, 'none')}), so they cannot be merged"
            )


def norm_parameters(layer: nn.Module) -> set[str]:
    """Names of the parameters that belong to norms, those inside the attention included."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in layer.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    }


def _copy(layer: nn.Module) -> nn.Module:
    """A deep copy without the original's hooks, sharing its config."""
    shared = [v for m in layer.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
    clone = copy.deepcopy(layer, {id(config): config for config in shared})
    for module in clone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return clone.requires_grad_(False)
