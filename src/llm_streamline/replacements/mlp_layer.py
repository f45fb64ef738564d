"""What stands in a model where no stock layer does: an FFN or bare MLP in place of a layer, a correction behind one.

Shapes: B batch, T tokens, d width, w inner width.

This file is also shipped, as it is, inside checkpoints whose replacement no stock layer can express: it must import
nothing but torch and transformers.
"""

import copy
import functools

import torch
from torch import nn
from transformers.activations import ACT2FN


class FFN(nn.Module):
    """W2 act(W1 x + b1) + b2, the FFN of LLM-Streamline (arXiv:2403.19135): (B, T, d) -> (B, T, d)."""

    def __init__(self, hidden_size: int, width: int, activation: str):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, width)
        self.down_proj = nn.Linear(width, hidden_size)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the network."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


class MlpLayer(nn.Module):
    """Takes a decoder layer's place in the model's loop: h + mlp(norm(h)), or mlp(h) without residual.

    It has no attention and writes nothing to the cache.
    """

    def __init__(self, mlp: nn.Module, norm: nn.Module | None, residual: bool, returns_tuple: bool):
        super().__init__()
        self.mlp, self.norm = mlp, norm
        self.residual, self.returns_tuple = residual, returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        """Map (B, T, d) to (B, T, d); everything else that a decoder layer is given is ignored."""
        inner = hidden_states if self.norm is None else self.norm(hidden_states)
        output = self.mlp(inner)
        if self.residual:
            output = hidden_states + output
        return (output, None) if self.returns_tuple else output


class StreamMap(nn.Module):
    """A correction of the residual stream, (B, T, d) -> (B, T, d): h + M h, h + b or e^s h; the identity at first."""

    def __init__(self, kind: str, hidden_size: int):
        super().__init__()
        if kind == "patch":
            self.map = nn.Linear(hidden_size, hidden_size, bias=False)
            nn.init.zeros_(self.map.weight)
        elif kind == "bias":
            self.bias = nn.Parameter(torch.zeros(hidden_size))
        else:
            self.log_scale = nn.Parameter(torch.zeros(1))  # a factor of zero or less would turn the state around
        self.kind = kind

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the correction."""
        if self.kind == "patch":
            return hidden_states + self.map(hidden_states)
        if self.kind == "bias":
            return hidden_states + self.bias.to(hidden_states.dtype)
        return hidden_states * self.log_scale.exp().to(hidden_states.dtype)


def add_stream_map(layer: nn.Module, stream_map: StreamMap) -> None:
    """Let `layer` pass what it puts out through a map, in place; its own weights keep their names."""
    layer.streamline_map = stream_map
    layer.__class__ = _corrected(type(layer))


@functools.cache
def _corrected(base: type) -> type:
    class Corrected(base):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if isinstance(output, tuple):
                return (self.streamline_map(output[0]), *output[1:])
            return self.streamline_map(output)

    Corrected.__name__, Corrected.__qualname__ = base.__name__, base.__qualname__  # some code goes by the name
    return Corrected


def build_mlp_layer(settings: dict, layer: nn.Module, hidden_size: int) -> MlpLayer:
    """Make the module that stands at one place, around parts of the decoder `layer` that was there.

    Args:
        settings: kind (`ffn` or `swiglu`), residual, returns_tuple; for an ffn width and activation; norm and mlp are
            the paths inside the layer of the norm before its MLP and of the MLP itself.
        layer: a decoder layer of the model.
        hidden_size: d.
    """
    norm = copy.deepcopy(layer.get_submodule(settings["norm"])) if settings["residual"] else None
    if settings["kind"] == "ffn":
        mlp = FFN(hidden_size, settings["width"], settings["activation"])
    else:
        mlp = copy.deepcopy(layer.get_submodule(settings["mlp"]))
    return MlpLayer(mlp, norm, settings["residual"], settings["returns_tuple"])
