"""Tensors on disk that are larger than memory: grown piece by piece, written whole or not at all, read as memory maps.

The file format is safetensors: 8 bytes with the header's length, a JSON header, the tensors' bytes one after another.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llm_streamline.output import saving

_NAMES = {"int32": "I32", "uint8": "U8"}
_CHUNK_BYTES = 1 << 24
_ALIGNMENT = 8


class TensorSpool:
    """A growing row of numbers: in a nameless temporary file of a folder, or in memory where there is no folder.

    A nameless file disappears with the process, however that ends.
    """

    def __init__(self, folder: Path | None):
        self._place = folder or Path("memory")  # for messages
        if folder is None:
            self._file: BinaryIO = io.BytesIO()
        else:
            with saving(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the spool

    def write(self, values: np.ndarray) -> None:
        """Append numbers.

        Raises:
            OutputError: if the disk is full.
        """
        with saving(self._place):
            self._file.write(np.ascontiguousarray(values).data)

    def array(self, dtype: type) -> np.ndarray:
        """All numbers written so far, (n,): a memory map of the file, or the memory itself."""
        if isinstance(self._file, io.BytesIO):
            return np.frombuffer(self._file.getbuffer(), dtype)
        with saving(self._place):
            self._file.flush()
            empty = os.fstat(self._file.fileno()).st_size == 0
            return np.empty(0, dtype) if empty else np.memmap(self._file, dtype, mode="r")

    def close(self) -> None:
        """Give the temporary file back; arrays taken from it stay valid."""
        if not isinstance(self._file, io.BytesIO):
            self._file.close()


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a .safetensors file in pieces: memory-mapped tensors are never read into memory as a whole.

    Args:
        path: the file; it appears complete or not at all.
        tensors: int32 and uint8 arrays.
        metadata: strings for the header.

    Raises:
        OutputError: if it cannot be written.
    """
    header: dict = {"__metadata__": metadata}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _NAMES[str(array.dtype)],
            "shape": array.shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % _ALIGNMENT)

    def write(file: BinaryIO) -> None:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in tensors.values():
            flat = array.reshape(-1)
            step = _CHUNK_BYTES // array.itemsize
            for start in range(0, len(flat), step):
                file.write(np.ascontiguousarray(flat[start : start + step]).data)

    _write_atomically(path, write)


def _write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then put it in its place.

    Raises:
        OutputError: if it cannot be written; `path` is then what it was before.
    """
    partial = path.with_name(f".{path.name}.partial")  # a fixed name: what a killed run left is overwritten, not kept
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
