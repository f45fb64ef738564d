"""A GGUF file as bytes: each metadata entry and each tensor where it lies, so that what does not change is copied.

Only for files that `sources.gguf.read_gguf_header` has accepted: counts and extents are believed here.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, STRING, ARRAY = 4, 8, 9
_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Entry:
    """One metadata entry: its key, the number of its type, and its value as the file holds it."""

    key: str
    kind: int
    raw: bytes

    @property
    def value(self) -> Any:
        """The value of a number, a boolean or a string; None for an array."""
        if self.kind in SCALARS:
            return struct.unpack("<" + SCALARS[self.kind], self.raw)[0]
        return self.raw[8:].decode("utf-8", errors="replace") if self.kind == STRING else None

    @property
    def length(self) -> int | None:
        """Elements of an array, None for anything else."""
        return struct.unpack_from("<Q", self.raw, 4)[0] if self.kind == ARRAY else None

    def elements(self) -> list[bytes]:
        """The elements of an array as bytes."""
        kind = struct.unpack_from("<I", self.raw)[0]
        position, found = 12, []
        for _ in range(self.length or 0):
            stop = _end_of_value(self.raw, position, kind)
            found.append(self.raw[position:stop])
            position = stop
        return found

    def with_value(self, value: Any) -> "Entry":
        """The same entry with another number or string."""
        if self.kind == STRING:
            text = value.encode("utf-8")
            return replace(self, raw=struct.pack("<Q", len(text)) + text)
        return replace(self, raw=struct.pack("<" + SCALARS[self.kind], value))

    def picked(self, indices: Sequence[int]) -> "Entry":
        """The same array with only these elements, in this order."""
        elements = self.elements()
        return replace(
            self, raw=self.raw[:4] + struct.pack("<Q", len(indices)) + b"".join(elements[i] for i in indices)
        )


@dataclass(frozen=True)
class RawTensor:
    """One tensor: shape in the file's order (rows last), the number of its type, and its place in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int  # byte in the file
    num_bytes: int


class RawGguf:
    """An open GGUF file; use as a context manager."""

    def __init__(self, path: Path, block_sizes: dict[int, tuple[int, int]]):
        self.path = path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 4
        self.version = self._number("I")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        self.entries = [self._entry() for _ in range(num_entries)]
        found = [self._tensor_info() for _ in range(num_tensors)]
        start = _round_up(self._position, self.alignment)
        self.tensors = []
        for name, shape, kind, offset in found:
            elements, num_bytes = block_sizes[kind]
            size = math.prod(shape) // elements * num_bytes
            self.tensors.append(RawTensor(name, shape, kind, start + offset, size))

    def __enter__(self) -> "RawGguf":
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    @property
    def alignment(self) -> int:
        """Every tensor starts at a multiple of this many bytes."""
        return self.get("general.alignment", 32)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a number or string in the metadata."""
        return next((entry.value for entry in self.entries if entry.key == key), default)

    def data(self, tensor: RawTensor) -> Iterator[bytes]:
        """A tensor's bytes in pieces."""
        stop = tensor.start + tensor.num_bytes
        for position in range(tensor.start, stop, _CHUNK_BYTES):
            yield self._data[position : min(stop, position + _CHUNK_BYTES)]

    def _number(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._position)[0]
        self._position += struct.calcsize("<" + code)
        return value

    def _text(self) -> str:
        length = self._number("Q")
        self._position += length
        return self._data[self._position - length : self._position].decode("utf-8", errors="surrogateescape")

    def _entry(self) -> Entry:
        key, kind = self._text(), self._number("I")
        start, self._position = self._position, _end_of_value(self._data, self._position, kind)
        return Entry(key, kind, self._data[start : self._position])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._text(), self._number("I")
        shape = tuple(self._number("Q") for _ in range(num_dims))
        return name, shape, self._number("I"), self._number("Q")


def write_raw(path: Path, source: RawGguf, entries: Sequence[Entry], tensors: Sequence[tuple[str, RawTensor]]) -> None:
    """Write a GGUF file from entries and from tensors of `source` under new names; their bytes are copied.

    Args:
        path: the file to write.
        source: where the tensors lie.
        entries: the metadata.
        tensors: new name and tensor, in the order in which they are to lie.
    """
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", source.version, len(tensors), len(entries)))
        for entry in entries:
            file.write(_packed_text(entry.key) + struct.pack("<I", entry.kind) + entry.raw)
        offset = 0
        for name, tensor in tensors:
            file.write(_packed_text(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
            file.write(struct.pack("<IQ", tensor.kind, offset))
            offset += _round_up(tensor.num_bytes, source.alignment)
        for _, tensor in tensors:
            file.write(bytes(-file.tell() % source.alignment))
            for piece in source.data(tensor):
                file.write(piece)
        file.write(bytes(-file.tell() % source.alignment))


def _end_of_value(data: Any, position: int, kind: int) -> int:
    if kind in SCALARS:
        return position + struct.calcsize("<" + SCALARS[kind])
    if kind == STRING:
        return position + 8 + struct.unpack_from("<Q", data, position)[0]
    element, count = struct.unpack_from("<IQ", data, position)
    position += 12
    if element in SCALARS:
        return position + count * struct.calcsize("<" + SCALARS[element])
    for _ in range(count):
        position = _end_of_value(data, position, element)
    return position


def _packed_text(text: str) -> bytes:
    raw = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
