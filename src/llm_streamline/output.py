"""Where results are written: folders that are ours, files that appear whole or not at all, a manifest written last.

Everything is first written under a temporary name in the same folder, forced to the disk, then renamed, so that a
killed run or a full disk never leaves half a file under a real name. What we did not write is never overwritten.
"""

import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_streamline.errors import OutputError
from llm_streamline.version import __version__

TOOL_FOLDER = "streamline"
RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
_OWNED_FILE = "files.json"  # names of the files beside the tool's folder that we wrote
_TOOL_NAME = "llm-streamline"
_TEMP_PREFIX = ".streamline-tmp-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def open_output(path: str | Path, *, fresh: bool = False, source: Path | None = None) -> Path:
    """Make sure `path` is an output folder of ours, creating it if need be, and return it.

    Args:
        path: the folder; may be missing, empty, or one that this program made.
        fresh: remove what an earlier run of ours left there first.
        source: the model that is read, which must not be overwritten.

    Raises:
        OutputError: the folder is not ours, is the source, is a file, or cannot be written.
    """
    out = check_output(path, source=source)
    with saving(out):
        if fresh and out.is_dir():
            _clear(out)
        (out / TOOL_FOLDER).mkdir(parents=True, exist_ok=True)
        for folder in (out, out / TOOL_FOLDER):
            for left in folder.glob(f"{_TEMP_PREFIX}*"):  # of a run that was killed while saving
                _remove(left)
        if not (out / TOOL_FOLDER / RUN_FILE).is_file():
            started = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(out / TOOL_FOLDER / RUN_FILE, {"tool": _TOOL_NAME, "version": __version__, "started": started})
    return out


def check_output(path: str | Path, *, source: Path | None = None) -> Path:
    """Refuse an output folder that `open_output` would refuse for what it is; writes nothing.

    Raises:
        OutputError: the folder is not ours, is the source, is a file, or cannot be written.
    """
    try:
        out = Path(path).expanduser()
        place = _nearest_existing(out)
        if "\0" in str(path):
            raise ValueError("a null character in its name")
        if not place.is_dir():
            raise OutputError(f"{place} is a file: choose a folder that does not exist yet")
        if not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"{place} is not writable: choose another folder")
        if source is not None and out.exists() and source.exists() and out.resolve() == source.resolve():
            raise OutputError(f"{out} is the model that is read: choose another output folder")
        if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
            raise OutputError(
                f"{out} is not empty and was not made by {_TOOL_NAME}: choose another folder, nothing was written"
            )
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null character, ~ of nobody
        raise OutputError(f"cannot use {path} as output folder: {getattr(error, 'strerror', None) or error}") from error
    return out


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _is_ours(out: Path) -> bool:
    try:
        marker = json.loads((out / TOOL_FOLDER / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("tool") == _TOOL_NAME


def _clear(out: Path) -> None:
    """Remove what we wrote and nothing else; the marker goes last, so that the folder stays ours until the end."""
    for name in owned_files(out):
        _remove(out / name)
    for path in (out / TOOL_FOLDER).iterdir():
        if path.name not in (RUN_FILE, _OWNED_FILE):
            _remove(path)
    for name in (_OWNED_FILE, RUN_FILE):
        _remove(out / TOOL_FOLDER / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- errors of the file system, in words


@contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn whatever the file system, safetensors or torch says when they cannot write into one sentence.

    Raises:
        OutputError: the disk is full, the folder is not writable, or any other failure to write.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(_explain(Path(path), error.errno, error.strerror or str(error))) from error
    except Exception as error:
        number = _foreign_errno(error)
        if number is None:
            raise
        raise OutputError(_explain(Path(path), number, str(error))) from error


def _explain(path: Path, number: int | None, text: str) -> str:
    if number in _DISK_FULL:
        return f"the disk is full: {path} was not written; free some space or choose another folder, then run again"
    if number in _FORBIDDEN:
        return f"{path} is not writable ({text}): choose another folder"
    return f"cannot write {path}: {text}"


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
        free = shutil.disk_usage(_nearest_existing(folder)).free
    if free < num_bytes:
        raise OutputError(
            f"the disk is full: {folder} needs {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; free some "
            "space or choose another folder"
        )


# --- files that appear whole


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file atomically and return its path; an existing file is replaced only when all is on the disk.

    Raises:
        OutputError: the disk is full, or the folder is not writable; the temporary file is removed.
    """
    path = Path(path)
    temporary = None
    with saving(path):
        try:
            handle, temporary = tempfile.mkstemp(prefix=_TEMP_PREFIX, dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
            _sync_folder(path.parent)
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
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
        _sync_folder(path.parent)
        if old.exists():
            _remove(old)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder inside `parent`, removed at the end if it is still there under its name."""
    staging = Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=parent))
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


def _sync_folder(folder: Path) -> None:
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


def publish(staging: Path, out: Path, last: str) -> None:
    """Move the files of `staging` into the output folder `out`, replacing those of ours that are there.

    What the previous call wrote and this one does not is removed (the shards of an earlier, larger model). The manifest
    goes first: until a new one is written the folder counts as unfinished.

    Args:
        staging: a folder on the same disk.
        out: from `open_output`.
        last: the file without which the folder is not usable; it is moved after all others.
    """
    names = sorted((p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file()), key=_last(last))
    with saving(out):
        sync_tree(staging)
        before = claim(out, names)
        remove_manifest(out)
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, out / name)
        for name in set(before) - set(names):
            _remove(out / name)
        write_json(out / TOOL_FOLDER / _OWNED_FILE, sorted(names))
        _sync_folder(out)


def _last(name: str) -> Any:
    return lambda other: (other == name, other)


def claim(out: Path, names: Iterable[str]) -> list[str]:
    """Note that these files of `out` are ours to write, before they are written; return what was ours before.

    If we are killed while writing them, the next run may still replace them and `fresh` may remove them.

    Raises:
        OutputError: one of them exists and is not ours.
    """
    before = owned_files(out)
    names = set(names)
    for name in sorted(names - set(before)):
        if (out / name).exists():
            raise OutputError(f"{out / name} exists and was not written by {_TOOL_NAME}: move it away, then run again")
    write_json(out / TOOL_FOLDER / _OWNED_FILE, sorted({*before, *names}))
    return before


def owned_files(out: Path) -> list[str]:
    """Names, relative to `out`, of the files beside the tool's folder that `publish` put there."""
    try:
        names = json.loads((out / TOOL_FOLDER / _OWNED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    plain = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [name for name in plain if not Path(name).is_absolute() and ".." not in Path(name).parts]


# --- the manifest


def write_manifest(out: Path, content: dict[str, Any]) -> Path:
    """Write the manifest, the last file of a run, with the size in bytes of every file the result consists of.

    Raises:
        OutputError: it cannot be written.
    """
    with saving(out):
        files = {name: (out / name).stat().st_size for name in owned_files(out)}
    complete = {**content, "tool": _TOOL_NAME, "version": __version__, "files": files}
    return write_json(out / TOOL_FOLDER / MANIFEST_FILE, complete)


def read_manifest(out: str | Path) -> dict[str, Any]:
    """Return the manifest of a finished run.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    path = Path(out) / TOOL_FOLDER / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OutputError(f"{out} holds no finished run: it has no {TOOL_FOLDER}/{MANIFEST_FILE}") from error
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise OutputError(f"{path} is not a manifest of {_TOOL_NAME}")
    return content


def remove_manifest(out: Path) -> None:
    """Mark the folder as unfinished, before anything in it changes."""
    with saving(out):
        (out / TOOL_FOLDER / MANIFEST_FILE).unlink(missing_ok=True)


def is_complete(out: str | Path) -> bool:
    """Whether `out` holds a finished run whose files still have the sizes that the manifest tells."""
    try:
        files = read_manifest(out)["files"]
        return all((Path(out) / name).stat().st_size == size for name, size in files.items())
    except (OutputError, OSError):
        return False
