"""Corrections of the residual stream in place of a span: a linear patch h + M h, a constant h + b, a factor.

They stand behind the layer before the span and add no layer. A constant is added to that layer's MLP bias, and a factor
is folded into all layers above, where that is exact; what cannot be folded goes out with modelling code (`ship.py`): a
patch always does, because a norm stands between the stream and every weight that reads it.
"""

import copy

import torch
from torch import Tensor, nn

from llm_streamline.arch import ArchSpec, fold_obstacle, get_layers, mlp_facts, present, silencing
from llm_streamline.errors import ArchitectureError
from llm_streamline.layer_config import MAP_KEY, text_config
from llm_streamline.plan import Plan, Replace
from llm_streamline.replacements.base import Replacement
from llm_streamline.replacements.mlp import add_mlp_biases
from llm_streamline.replacements.mlp_layer import StreamMap, add_stream_map
from llm_streamline.surgery import shallow_copy


class StreamReplacement(Replacement):
    """A patch (Ghosted Layers, LinearPatch), a constant (mean update) or a factor (Prune&Comp); starts as removal."""

    def __init__(self, model: nn.Module, plan: Plan, edit: Replace, arch: ArchSpec):
        super().__init__(plan, edit, arch)
        before = get_layers(model)[plan.layer_sources()[self.position - 1]]
        self.resume_at = self.position - 1
        self.kind = edit.network.kind
        self.map = StreamMap(self.kind, model.get_input_embeddings().weight.shape[1])
        self.map.to(next(before.parameters()).device)
        if hasattr(before, "streamline_map"):
            raise ArchitectureError(
                f"layer {edit.start - 1} carries a correction already, from an earlier run; replace another span"
            )
        layer = shallow_copy(before)  # shares everything with the original but the map
        add_stream_map(layer, self.map)
        self._layer = (layer,)

    @property
    def install_order(self) -> int:
        """A constant is added to a bias that may have been healed, a factor changes all that is there by then."""
        return {"patch": 0, "bias": 1, "scale": 2}[self.kind]

    def patches(self) -> dict[int, nn.Module]:
        """The layer before the span, with the map behind it."""
        return {self.position - 1: self._layer[0]}

    def output_projection(self) -> nn.Module:
        """The patch's matrix."""
        return self.map.map

    @torch.no_grad()
    def install(self, model: nn.Module) -> None:
        """Fold the map into stock weights where that is exact, otherwise put it behind the layer."""
        if self.kind == "bias" and self._fold_bias(model):
            return
        if self.kind == "scale" and scale_obstacle(model, self.arch, self.position) is None:
            fold_scale(model, self.arch, self.position, float(self.map.log_scale.double().exp()))
            return
        layer = get_layers(model)[self.position - 1]
        if "forward" in vars(layer):  # accelerate's: it would run the layer without the map
            raise ArchitectureError(
                f"layer {self.position - 1} is offloaded, so that no {self.kind} can be put behind it; load the model "
                "without offloading it"
            )
        stream_map = copy.deepcopy(self.map).to(device=next(layer.parameters()).device, dtype=model.dtype)
        add_stream_map(layer, stream_map.requires_grad_(False))
        config = text_config(model.config)
        setattr(config, MAP_KEY, {**(getattr(config, MAP_KEY, None) or {}), str(self.position - 1): self.kind})

    def _fold_bias(self, model: nn.Module) -> bool:
        """Add the constant to the MLP's output bias, if the layer has or can have one; tell whether it has."""
        layer, config = get_layers(model)[self.position - 1], text_config(model.config)
        if fold_obstacle(layer, self.arch):
            return False
        facts = mlp_facts(layer, self.arch)
        projection = layer.get_submodule(facts.down)
        if getattr(projection, "bias", None) is None:
            if facts.kind != "gated" or None in (facts.gate, facts.up) or not hasattr(config, "mlp_bias"):
                return False
            add_mlp_biases(model, self.arch)
        constant = self.map.bias.float() / getattr(config, "residual_multiplier", 1.0)
        projection.bias.copy_(projection.bias.float() + constant.to(projection.bias.device))
        return True


def scale_obstacle(model: nn.Module, arch: ArchSpec, position: int) -> str | None:
    """Why a factor before layer `position` cannot be folded into the layers from there on; None when it can.

    Scaling the stream by a at one place is the same, up to the norms' epsilon, as dividing by a all that is written to
    it afterwards: whatever reads the stream reads it through a norm, which takes the common factor out.
    """
    if arch.identity_obstacle:
        return arch.identity_obstacle
    if arch.final_norm is None:
        return "no norm stands before the head"
    for layer in list(get_layers(model))[position:]:
        if not present(layer, (*arch.attention_out, *arch.mlp_out)):
            return "a network that is no stock layer stands above"
        reads_raw = arch.attention_norm_in is None or (present(layer, arch.mlp_out) and arch.mlp_norm_in is None)
        if reads_raw:
            return "the layers read the stream without a norm"
    return None


@torch.no_grad()
def fold_scale(model: nn.Module, arch: ArchSpec, position: int, factor: float) -> None:
    """Divide by `factor` all that the layers from `position` on write to the stream; see `scale_obstacle`.

    What silences a layer's sublayers is what the layer writes linearly in: its distance from silence is divided.

    Prune&Comp multiplies the embedding and all layers below instead, which is the same function: the final norm takes
    out the factor between the two. This way the embedding, which may be the head as well, stays as it is.
    """
    for layer in list(get_layers(model))[position:]:
        for part in ("attention", "mlp"):
            for name, silent in silencing(layer, arch, part).items():
                parameter = layer.get_parameter(name)
                parameter.copy_(_divided(parameter, silent, factor))


def _divided(parameter: Tensor, silent: float, factor: float) -> Tensor:
    precise = parameter.double() if parameter.device.type != "mps" else parameter.float()
    return silent + (precise - silent) / factor
