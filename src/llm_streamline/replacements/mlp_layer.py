"""An FFN or a bare MLP standing where a decoder layer was. Shapes: B batch, T tokens, d width, w inner width.

This file is also shipped, as it is, inside checkpoints whose replacement no stock layer can express: it must import
nothing but torch and transformers.
"""

import copy

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
