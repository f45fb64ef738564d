"""Safetensors written one tensor at a time, in shards with a right index.

The bytes are those that the safetensors library writes: 8 bytes header length, a JSON header padded to 8 bytes, the
tensors by falling size of their numbers, then by name.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.sources.weights import INDEX_FILE, SINGLE_FILE, TensorHeader

if TYPE_CHECKING:
    import torch

_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
# The order in which the library lays dtypes out, last first.
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64")
_ORDER += ("I64", "U64")


def parse_size(text: str | int) -> int:
    """Bytes of a size such as 5GB, 200MB or 8KB (powers of ten)."""
    if isinstance(text, int):
        return text
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    unit = text.strip().upper()[-2:]
    return int(float(text.strip()[:-2]) * units[unit])


def split_shards(tensors: Iterable[tuple[str, TensorHeader]], max_bytes: int) -> list[list[str]]:
    """Fill shards in the given order, none above `max_bytes` unless one tensor alone is."""
    shards: list[list[str]] = []
    room = 0
    for name, header in tensors:
        size = num_bytes(header)
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def shard_order(name: str) -> list[tuple[int, int, str]]:
    """Transformers fills shards by name, numbers by value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def num_bytes(header: TensorHeader) -> int:
    """Bytes that a tensor takes in the file."""
    return header.num_elements * _BYTES[header.dtype]


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[str]],
    headers: dict[str, TensorHeader],
    read: Callable[[str], "torch.Tensor"],
) -> None:
    """Write the shards and, when there are several, the index.

    Args:
        folder: where to write.
        shards: names of the tensors of each shard.
        headers: dtype and shape of every tensor as it will be written.
        read: gives a tensor by name; called once for each, and the tensor is dropped before the next.
    """
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0], headers, read)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file_name, names, headers, read)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(num_bytes(headers[name]) for names in shards for name in names)
    parameters = sum(headers[name].num_elements for names in shards for name in names)
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(
    path: Path, names: Sequence[str], headers: dict[str, TensorHeader], read: Callable[[str], "torch.Tensor"]
) -> None:
    names = sorted(names, key=lambda name: (-_ORDER.index(headers[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        stop = position + num_bytes(headers[name])
        header[name] = {
            "dtype": headers[name].dtype,
            "shape": list(headers[name].shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in _pieces(read(name)):
                file.write(piece)


def _pieces(tensor: "torch.Tensor") -> Iterator[memoryview]:
    import torch

    yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
