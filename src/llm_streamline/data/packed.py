"""Plain, gzip and zstandard files behind one `open`, as streams of unpacked bytes."""

import gzip
import io
from pathlib import Path
from typing import BinaryIO

from llm_streamline.errors import MissingExtraError

PACKINGS = (".gz", ".zst")
_CHUNK_BYTES = 1 << 16


def split_packing(path: Path) -> tuple[str, str]:
    """Split a file's name into the name without packing and the packing's suffix ("" for none)."""
    suffix = path.suffix.lower()
    return (path.name[: -len(suffix)], suffix) if suffix in PACKINGS else (path.name, "")


def open_packed(path: Path) -> BinaryIO:
    """Open a file for reading its unpacked bytes.

    Raises:
        MissingExtraError: if it is packed with zstandard and the package for it is not installed.
        OSError, EOFError: (also while reading) if it cannot be read, is corrupt, or ends too early.
    """
    _, packing = split_packing(path)
    if packing == ".gz":
        return gzip.open(path, "rb")
    if packing == ".zst":
        return io.BufferedReader(_ZstdReader(path), buffer_size=_CHUNK_BYTES)
    return open(path, "rb")


class _ZstdReader(io.RawIOBase):
    """Unpacked bytes of a .zst file of one or more frames.

    The package's own reader takes a truncated file for a shorter one without a word; this one raises EOFError.
    """

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError:
            raise MissingExtraError(
                f'reading {path.name} needs the package zstandard: pip install "llm-streamline[zst]"'
            ) from None
        self._zstd = zstandard
        self._file = open(path, "rb")  # noqa: SIM115 - closed in close()
        self._frame = None  # the decompressor of the current frame; None between frames
        self._packed: bytes = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        """Return True: this is for reading."""
        return True

    def readinto(self, target) -> int:
        """Fill `target` with the next unpacked bytes; 0 at the end of the last frame."""
        while not self._unpacked:
            if not self._packed:
                self._packed = self._file.read(_CHUNK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last zstandard frame is not complete")
                return 0
            self._unpack()
        count = min(len(target), len(self._unpacked))
        target[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._zstd.ZstdDecompressor().decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._zstd.ZstdError as problem:
            raise OSError(f"not a valid zstandard file ({problem})") from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()
