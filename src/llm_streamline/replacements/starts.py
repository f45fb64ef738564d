"""Where training starts: copies, averages, the identity, random weights. The closed form is in `closed_form.py`.

A start is at least as good as plain removal where the identity is possible; `random` and networks without residual
exist to reproduce the paper (LLM-Streamline, arXiv:2403.19135), which starts its FFN so.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from llm_streamline.arch import get_layers, silence, silence_attention, silence_mlp
from llm_streamline.errors import ArchitectureError
from llm_streamline.layer_config import text_config
from llm_streamline.offload import weights_in_memory
from llm_streamline.packed import is_packed, plain_copy
from llm_streamline.replacements.base import Replacement, copy_weights
from llm_streamline.replacements.layer import LayerReplacement, SilencedLayerReplacement
from llm_streamline.replacements.linear import LinearReplacement
from llm_streamline.replacements.stream import StreamReplacement

SIMPLE_STARTS = ("first", "last", "middle", "average", "random", "identity")


@torch.no_grad()
def set_start(replacement: Replacement, model: nn.Module, init: str, seed: int) -> None:
    """Give a freshly built replacement one of the simple starts, in place.

    Args:
        replacement: as `build_replacements` made it: first, last and middle are already the template layers' weights.
        model: the original.
        init: one of SIMPLE_STARTS.
        seed: of `random`, and of the first projection of an FFN, which has no layer to be copied from.

    Raises:
        ArchitectureError: if this start does not exist for this network or architecture; the message says why.
    """
    if init == "random":
        _randomise(replacement, model, seed)
    elif init == "identity":
        if not isinstance(replacement, LayerReplacement) and replacement.edit.network.kind == "ffn":
            _randomise(replacement, model, seed)
        _make_identity(replacement)
    elif init == "average":
        _average(replacement, model)
    elif not isinstance(replacement, LayerReplacement) and replacement.edit.network.kind == "ffn":
        raise ArchitectureError(
            f"an ffn in this {replacement.arch.model_type} has no layer to be copied from by init `{init}`; "
            "use init best, closed_form, identity or random"
        )
    elif init == "last" and isinstance(replacement, LayerReplacement):
        stop = replacement.edit.stop
        for layer, source in zip(replacement.layers, range(stop - len(replacement.layers), stop), strict=True):
            _copy_layer(replacement, layer, get_layers(model)[source])


def available_starts(replacement: Replacement, model: nn.Module) -> list[str]:
    """Simple starts that make sense for this network, for `best` to try."""
    if not isinstance(replacement, LayerReplacement):
        return ["identity"] if replacement.edit.network.residual else ["random"]
    starts = ["first"]
    if _same_shapes(replacement, model):
        starts += ["last", "average"]
    if replacement.arch.identity_obstacle is None:
        starts.append("identity")
    return starts


def quick_start(replacement: Replacement, model: nn.Module, seed: int) -> None:
    """The start that costs nothing: a copy where the network is a layer, otherwise plain removal. To compare spans."""
    init = replacement.edit.network.init
    cheap = init if init in SIMPLE_STARTS else available_starts(replacement, model)[0]
    set_start(replacement, model, cheap, seed)


def _make_identity(replacement: Replacement) -> None:
    if isinstance(replacement, LinearReplacement):
        nn.init.eye_(replacement.mapped.map.weight)
    elif isinstance(replacement, StreamReplacement):
        for parameter in replacement.map.parameters():
            parameter.zero_()
    elif isinstance(replacement, SilencedLayerReplacement):
        silence_mlp(replacement.layers[0], replacement.arch)
    elif isinstance(replacement, LayerReplacement):
        for layer in replacement.layers:
            silence(layer, replacement.arch)
    else:
        # only the last map is zero: its gradient is then not, and training can leave the identity
        for parameter in replacement.output_projection().parameters():
            parameter.zero_()


def _average(replacement: Replacement, model: nn.Module) -> None:
    if not isinstance(replacement, LayerReplacement) or not _same_shapes(replacement, model):
        raise ArchitectureError(
            f"init `average` needs a network of decoder layers and a span whose layers are alike; "
            f"use init `first` for this {replacement.edit.network.kind}"
        )
    span = [get_layers(model)[i] for i in range(replacement.edit.start, replacement.edit.stop)]
    groups = _split(span, len(replacement.layers))
    for layer, group in zip(replacement.layers, groups, strict=True):
        averaged = {
            name: parameter
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad or not isinstance(replacement, SilencedLayerReplacement)
        }
        for place, member in enumerate(group):  # one at a time: they may come from disk
            with weights_in_memory(member):
                weights = dict((plain_copy(member) if is_packed(member) else member).named_parameters())
                for name, parameter in averaged.items():
                    share = weights[name].float() / len(group)
                    parameter.copy_(share) if place == 0 else parameter.add_(share.to(parameter.device))


def _randomise(replacement: Replacement, model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", None) or 0.02
    for name, parameter in replacement.trainable():
        if parameter.ndim >= 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        elif name.endswith("bias"):
            parameter.zero_()  # a norm's weight keeps the template's value: what is neutral differs per family


def _copy_layer(replacement: Replacement, target: nn.Module, source: nn.Module) -> None:
    copy_weights(plain_copy(source) if is_packed(source) else source, target)
    if isinstance(replacement, SilencedLayerReplacement):
        silence_attention(target, replacement.arch)


def _same_shapes(replacement: LayerReplacement, model: nn.Module) -> bool:
    layers = get_layers(model)
    span = [layers[i] for i in range(replacement.edit.start, replacement.edit.stop)]
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in span]
    kinds = getattr(text_config(model.config), "layer_types", None) or [None] * len(layers)
    return (
        all(shape == shapes[0] for shape in shapes)
        and len(set(kinds[replacement.edit.start : replacement.edit.stop])) == 1
    )


def _split(items: Sequence[nn.Module], parts: int) -> list[Sequence[nn.Module]]:
    """Cut a sequence into `parts` runs of nearly equal length, in order."""
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(bounds)]
