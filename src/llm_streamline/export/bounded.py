"""Saving a model whose layers are on disk: one layer at a time is in memory, the files are those of `save_pretrained`.

Names and shapes are first worked out without data, on the meta device; then each layer is read, taken back to the
names and shapes of its files where transformers fuses weights on loading, written, and let go of.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_streamline.arch import get_layers
from llm_streamline.export.shards import parse_size, shard_order, split_shards, write_shards
from llm_streamline.offload import weights_in_memory
from llm_streamline.sources.weights import TensorHeader
from llm_streamline.structure import path_of

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Tensors = dict[str, Tensor]


def save_model(model: PreTrainedModel, folder: Path, *, max_shard_size: str, original_format: bool) -> None:
    """Write weights, config and generation settings; see `PreTrainedModel.save_pretrained` for the arguments."""
    revert = _reverter(model) if original_format else lambda tensors: tensors
    groups = _groups(model)
    headers, group_of = {}, {}
    for number, (_, names) in enumerate(groups):
        empty = {name: tensor.to("meta") for name, tensor in names.items()}
        for name, tensor in revert(empty).items():
            headers[name] = TensorHeader(_NAMES[tensor.dtype], tuple(tensor.shape))
            group_of[name] = number
    headers = {name: headers[name] for name in sorted(headers, key=shard_order)}
    held: dict[int, Tensors] = {}

    def read(name: str) -> Tensor:
        number = group_of[name]
        if number not in held:
            held.clear()  # one layer at a time
            layer, names = groups[number]
            held[number] = revert(_real(layer, names) if layer is not None else dict(names))
        return held[number][name].detach().cpu()

    write_shards(folder, split_shards(headers.items(), parse_size(max_shard_size)), headers, read)
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _groups(model: PreTrainedModel) -> list[tuple[nn.Module | None, Tensors]]:
    """The state dict without second copies of tied weights: each layer's part with the layer, then all the rest."""
    ignored = {*(getattr(model, "all_tied_weights_keys", None) or {}), *(model._keys_to_ignore_on_save or ())}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    path = path_of(model, get_layers(model))
    groups: list[tuple[nn.Module | None, Tensors]] = []
    for index, layer in enumerate(get_layers(model)):
        prefix = f"{path}.{index}."
        groups.append((layer, {name: state.pop(name) for name in list(state) if name.startswith(prefix)}))
    return [*groups, (None, state)]


def _real(layer: nn.Module, names: Tensors) -> Tensors:
    """The same tensors with their data."""
    with weights_in_memory(layer):
        own = layer.state_dict(keep_vars=True)
        depth = len(next(iter(names))) - len(next(iter(own)))  # the names begin with where the layer stands
        return {name: own[name[depth:]] for name in names}


def _reverter(model: PreTrainedModel) -> Callable[[Tensors], Tensors]:
    from transformers.core_model_loading import revert_weight_conversion

    return lambda tensors: revert_weight_conversion(model, tensors)
