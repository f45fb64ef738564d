"""Files that appear whole or not at all, and what a file system says when it cannot write, in words.

Everything is first written under a temporary name in the same folder, forced to the disk, then renamed, so that a
killed run or a full disk never leaves half a file under a real name.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline import ranks
from llm_streamline.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

TEMP_PREFIX = ".streamline-tmp-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn whatever the file system, safetensors or torch says when they cannot write into one sentence.

    Raises:
        OutputError: the disk is full, the folder is not writable, or any other failure to write.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(_explain(Path(path), _errno(error), error.strerror or str(error))) from error
    except Exception as error:
        number = _foreign_errno(error)
        if number is None:
            raise
        raise OutputError(_explain(Path(path), number, str(error))) from error


@contextmanager
def disk_full_in_words(path: str | Path) -> Iterator[None]:
    """Around a whole run: a full or read-only disk met outside of `saving`; all other errors are left as they are.

    Raises:
        OutputError: the disk that holds `path` is full, or cannot be written.
    """
    try:
        yield
    except OSError as error:
        number = _errno(error)
        if number not in (*_DISK_FULL, errno.EROFS):
            raise
        raise OutputError(_explain(Path(error.filename or path), number, str(error))) from error


def _explain(path: Path, number: int | None, text: str) -> str:
    if number in _DISK_FULL:
        return f"the disk is full: {path} was not written; free some space or choose another folder, then run again"
    if number in _FORBIDDEN:
        return f"{path} is not writable ({text}): choose another folder"
    return f"cannot write {path}: {text}"


def _errno(error: OSError) -> int | None:
    """The error's number; of a folder that could not be copied, that of the first file that could not."""
    if isinstance(error, shutil.Error) and (found := re.search(r"\[Errno (\d+)\]", str(error))):
        return int(found[1])
    return error.errno


def _foreign_errno(error: Exception) -> int | None:
    """The errno inside an error of safetensors (written in Rust) or of torch.save (in C++), None for other errors."""
    safetensors = sys.modules.get("safetensors")
    if safetensors is not None and isinstance(error, safetensors.SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found else errno.EIO
    if isinstance(error, RuntimeError) and re.search(
        r"PytorchStreamWriter|inline_container|iostream error", str(error)
    ):
        return errno.ENOSPC  # torch does not say why; nothing else makes a write to an open file fail in practice
    return None


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse early when the disk that holds `folder` has less than `num_bytes` free.

    Raises:
        OutputError: too little room; the message gives both sizes.
    """
    with saving(folder):
        free = shutil.disk_usage(nearest_existing(folder)).free
    if free < num_bytes:
        raise OutputError(
            f"the disk is full: {folder} needs {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; free some "
            "space or choose another folder"
        )


# --- files that appear whole


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file atomically and return its path; an existing file is replaced only when all is on the disk.

    Of several ranks at one run only rank 0 writes.

    Raises:
        OutputError: the disk is full, or the folder is not writable; the temporary file is removed.
    """
    path = Path(path)
    temporary = None
    if not ranks.is_main():
        return path
    with saving(path):
        try:
            handle, temporary = tempfile.mkstemp(prefix=TEMP_PREFIX, dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
            sync_folder(path.parent)
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
    return path


def write_tensors(path: str | Path, tensors: "Mapping[str, Tensor]") -> Path:
    """Write a safetensors file atomically, without a second copy of the tensors in memory; see `write_bytes`."""
    from safetensors.torch import save_file

    path = Path(path)
    with saving(path):
        partial = path.with_name(f"{TEMP_PREFIX}{path.name}")
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically; see `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically; numbers that are not finite become null, which JSON has and they have not."""
    return write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill; it takes the place of `path` when the block ends without error.

    Raises:
        OutputError: the disk is full, or the parent is not writable; what was there before stays.
    """
    path = Path(path)
    with saving(path), temporary_folder(path.parent) as staging:
        yield staging
        sync_tree(staging)
        old = staging.with_name(staging.name + "-old")
        if path.exists():
            os.rename(path, old)
        os.rename(staging, path)
        sync_folder(path.parent)
        if old.exists():
            remove(old)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder inside `parent`, removed at the end if it is still there under its name."""
    staging = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=parent))
    os.chmod(staging, 0o777 & ~_umask())
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Force every file below `folder` to the disk, and give each the permissions of an ordinary new file."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.chmod(path, 0o666 & ~_umask())  # safetensors writes files that only their owner can read
            with path.open("rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- small things


def sha256_of(path: Path) -> str:
    """sha256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nearest_existing(path: Path) -> Path:
    """Return the deepest folder on the way to `path` that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
