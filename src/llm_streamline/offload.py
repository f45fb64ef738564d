"""Decoder layers that stay on disk and are in memory only while they run: accelerate's offload, one layer at a time.

The weights are read from the source's own safetensors files, so there is no second copy on disk; only families whose
weights transformers fuses while loading (mixtures of experts) get one, in a temporary folder. On the CPU a layer in the
files' own dtype is a memory map: its pages are page cache and not memory of the process. While a layer runs, the
operating system is already told to fetch the next one.
"""

import copy
import json
import logging
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn
from transformers import PretrainedConfig

from llm_streamline.arch import get_layers
from llm_streamline.files import disk_full_in_words
from llm_streamline.layer_config import text_config
from llm_streamline.skeleton import build_skeleton
from llm_streamline.structure import find_layers_path, path_of


class StreamedLayer(ModelHook):
    """Gives a layer its weights before its forward and takes them back afterwards."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device, readahead: "Readahead", index: int):
        self.weights, self.device = weights, device
        self._readahead, self._index = readahead, index

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Remember where the layer's parameters are; they are on the meta device already."""
        self._slots = [
            (owner, leaf, f"{path}.{leaf}".lstrip("."), parameter)
            for path, owner in module.named_modules()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None and parameter.is_meta
        ]
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Bring the weights."""
        self._readahead.fetch(self._index, self._index + 1)
        for owner, leaf, name, empty in self._slots:
            value = self.weights[name].to(device=self.device, dtype=empty.dtype)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Let go of the weights; what autograd still needs of them stays until its backward."""
        for owner, leaf, _, empty in self._slots:
            owner._parameters[leaf] = empty
        return output


class Readahead:
    """Asks the operating system to read layers' bytes before they are needed, in a thread of its own."""

    def __init__(self, ranges: dict[int, list[tuple[str, int, int]]]):
        self._ranges = ranges  # layer -> file, first byte, number of bytes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="readahead") if hasattr(os, "posix_fadvise") else None

    def fetch(self, *layers: int) -> None:
        """Start reading these layers and return at once; layers that do not exist are skipped."""
        if self._pool is not None:
            for layer in layers:
                if layer in self._ranges:
                    self._pool.submit(_will_need, self._ranges[layer])


def _will_need(ranges: list[tuple[str, int, int]]) -> None:
    for path, start, size in ranges:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, start, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def load_with_layers_on_disk(
    model_class: type,
    folder: str | Path,
    config: PretrainedConfig,
    device: torch.device,
    *,
    scratch: Path | None = None,
    **options: Any,
):
    """Load a checkpoint whose decoder layers stay on disk; everything else goes to `device`.

    Args:
        model_class: what has the `from_pretrained` to call.
        folder: the checkpoint.
        config: the checkpoint's; not to be used for anything else afterwards.
        device: where layers run.
        scratch: folder for weights that transformers must rearrange; None is the system's for temporary files.
        options: of `from_pretrained`; `output_loading_info` and `trust_remote_code` must be among them.

    Returns:
        What `from_pretrained` returns: the model, in which each layer brings its weights itself, and the loading info.
    """
    skeleton = build_skeleton(config, model_class, own_code=options["trust_remote_code"])
    layers_path = find_layers_path(skeleton, text_config(config))
    converted = tempfile.TemporaryDirectory(prefix="llm-streamline-converted-", dir=scratch)
    places = _device_map(skeleton, layers_path, device)
    # they warn that layers are on the meta device, which was asked for, and that buffers have no device of their own
    with (
        _silent("accelerate.big_modeling"),
        warnings.catch_warnings(action="ignore"),
        disk_full_in_words(converted.name),
    ):
        model, info = model_class.from_pretrained(folder, device_map=places, offload_folder=converted.name, **options)
    weights = _offloaded_weights(model)
    remove_hook_from_module(model, recurse=True)
    model.__dict__.pop("hf_device_map", None)  # the hooks below say where each layer is
    layers = get_layers(model)
    readahead = Readahead(_byte_ranges(weights, layers_path, len(layers)))
    for index, layer in enumerate(layers):
        own = PrefixedDataset(weights, f"{layers_path}.{index}.")
        add_hook_to_module(layer, StreamedLayer(own, device, readahead, index))
    if any(Path(converted.name).iterdir()):
        weakref.finalize(model, converted.cleanup)
    else:
        converted.cleanup()
    return model, info


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _device_map(skeleton: nn.Module, layers_path: str, device: torch.device) -> dict[str, str]:
    """The layers on disk, their siblings and their parents' siblings on the device."""
    places, node = {}, skeleton
    for step in layers_path.split("."):
        names = [name for name, _ in node.named_children()]
        names += [name for name, _ in (*node.named_parameters(recurse=False), *node.named_buffers(recurse=False))]
        prefix = path_of(skeleton, node)
        places |= {f"{prefix}.{name}".lstrip("."): str(device) for name in names if name != step}
        node = node.get_submodule(step)
    return places | {layers_path: "disk"}


def _offloaded_weights(model: nn.Module) -> OffloadedWeightsLoader:
    """accelerate's map from parameter names to the places on disk."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if isinstance(weights, PrefixedDataset):
            return weights.dataset
    raise AssertionError("no layer of the model was left on disk")


def _byte_ranges(weights: OffloadedWeightsLoader, path: str, num_layers: int) -> dict[int, list[tuple[str, int, int]]]:
    headers: dict[str, tuple[int, dict]] = {}
    ranges: dict[int, list[tuple[str, int, int]]] = {index: [] for index in range(num_layers)}
    for name, place in weights.index.items():
        index, _, _ = name.removeprefix(f"{path}.").partition(".")
        if not name.startswith(f"{path}.") or not index.isdigit():
            continue
        file = str(place["safetensors_file"])
        if file not in headers:
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                headers[file] = 8 + length, json.loads(stream.read(length))
        base, header = headers[file]
        start, stop = header[place["weight_name"]]["data_offsets"]
        ranges[int(index)].append((file, base + start, stop - start))
    return ranges


# --- what code that touches a layer's weights asks


def is_streamed(module: nn.Module) -> bool:
    """Whether this layer, or any layer of this model, has its weights on disk."""
    return any(isinstance(getattr(part, "_hf_hook", None), StreamedLayer) for part in module.modules())


@contextmanager
def weights_in_memory(layer: nn.Module) -> Iterator[nn.Module]:
    """While open, a streamed layer has its weights; any other layer is left as it is."""
    hook = getattr(layer, "_hf_hook", None)
    if not isinstance(hook, StreamedLayer) or not any(parameter.is_meta for parameter in layer.parameters()):
        yield layer
        return
    hook.pre_forward(layer)
    try:
        yield layer
    finally:
        hook.post_forward(layer, None)


def own_copy(layer: nn.Module) -> nn.Module:
    """A deep copy of a layer with its weights in memory, without a streamed layer's hook."""
    hook = getattr(layer, "_hf_hook", None)
    with weights_in_memory(layer):
        clone = copy.deepcopy(layer, {id(hook): None} if isinstance(hook, StreamedLayer) else None)
    if isinstance(hook, StreamedLayer):
        for name in ("_hf_hook", "_old_forward", "forward"):
            clone.__dict__.pop(name, None)
    return clone


def bring_home(layer: nn.Module) -> None:
    """Load a streamed layer's weights for good; a layer that is not streamed is left as it is."""
    hook = getattr(layer, "_hf_hook", None)
    if isinstance(hook, StreamedLayer):
        hook.pre_forward(layer)
        remove_hook_from_module(layer)
        layer.__dict__.pop("forward", None)
