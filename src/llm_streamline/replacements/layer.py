"""One or more decoder layers of the model's own class in place of a span, and the same with silenced attention.

A decoder layer whose attention adds exactly zero *is* a normed MLP with a residual: so a SwiGLU (in a model with gated
MLPs) and an FFN (in a model with plain ones) are stock layers too, and stock transformers loads the result.
"""

from torch import nn

from llm_streamline.arch import ArchSpec, get_layers, silence_attention
from llm_streamline.plan import Plan, Replace
from llm_streamline.replacements.base import Replacement, copy_weights, layers_at, master_copy


class LayerReplacement(Replacement):
    """m decoder layers, started from the template layers the plan names (LLM-Streamline's `Layer`)."""

    def __init__(self, model: nn.Module, plan: Plan, edit: Replace, arch: ArchSpec):
        super().__init__(plan, edit, arch)
        originals = get_layers(model)
        self.layers = nn.ModuleList(master_copy(originals[index]) for index in edit.templates)

    def patches(self) -> dict[int, nn.Module]:
        """The layers, at their places."""
        return {self.position + i: layer for i, layer in enumerate(self.layers)}

    def install(self, model: nn.Module) -> None:
        """Copy the weights into the layers that stand at these places."""
        for trained, target in zip(self.layers, layers_at(model, self), strict=True):
            copy_weights(trained, target)

    def output_projection(self) -> nn.Module:
        """The last layer's MLP output projection."""
        return output_projection_of(self.layers[-1], self.arch)


class SilencedLayerReplacement(LayerReplacement):
    """A decoder layer whose attention adds zero: LLM-Streamline's SwiGLU or FFN, in residual form and with its norm."""

    def __init__(self, model: nn.Module, plan: Plan, edit: Replace, arch: ArchSpec):
        super().__init__(model, plan, edit, arch)
        layer = self.layers[0]
        silence_attention(layer, arch)
        keep = [name for name in (arch.mlp_norm_in, arch.mlp_norm_out) if name]
        if arch.parallel and arch.attention_norm_in:
            keep.append(arch.attention_norm_in)  # one norm feeds both branches
        trainable = {id(p) for name in keep for p in layer.get_submodule(name).parameters()}
        trainable |= {id(p) for p in mlp_parameters(layer, arch)}
        for parameter in layer.parameters():
            parameter.requires_grad_(id(parameter) in trainable)


def output_projection_of(layer: nn.Module, arch: ArchSpec) -> nn.Module:
    """The projection through which a layer's MLP writes to the residual stream."""
    return next(layer.get_submodule(name) for name in arch.mlp_out if _has(layer, name))


def mlp_parameters(layer: nn.Module, arch: ArchSpec) -> list[nn.Parameter]:
    """Parameters of a layer's MLP, norms not included."""
    family = arch.family
    if family.mlp:
        return list(layer.get_submodule(family.mlp).parameters())
    names = (*family.gate, *family.up, *family.gate_up, *family.mlp_out)
    return [p for name in names if _has(layer, name) for p in layer.get_submodule(name).parameters()]


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True
