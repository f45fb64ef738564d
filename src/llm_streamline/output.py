"""Output folders: which are ours, what in them is ours, and a manifest that is written last.

What we did not write is never overwritten or removed. How single files are written is told in `files.py`; its functions
are offered here too, because whoever writes into an output folder needs both.
"""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_streamline import ranks
from llm_streamline.errors import OutputError
from llm_streamline.files import (
    TEMP_PREFIX,
    check_room,
    nearest_existing,
    remove,
    replace_folder,
    saving,
    sync_folder,
    sync_tree,
    temporary_folder,
    write_bytes,
    write_json,
    write_text,
)
from llm_streamline.runs.lock import LOCK_FILE
from llm_streamline.version import __version__

__all__ = [
    "TOOL_FOLDER",
    "check_output",
    "check_room",
    "claim",
    "is_complete",
    "open_output",
    "owned_files",
    "publish",
    "read_manifest",
    "remove_manifest",
    "replace_folder",
    "saving",
    "temporary_folder",
    "withdraw",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_text",
]

TOOL_FOLDER = "streamline"
RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
_OWNED_FILE = "files.json"  # names of the files beside the tool's folder that we wrote
_TOOL_NAME = "llm-streamline"


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
            for left in folder.glob(f"{TEMP_PREFIX}*"):  # of a run that was killed while saving
                remove(left)
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
        place = nearest_existing(out)
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


def withdraw(out: Path, *, existed: bool) -> None:
    """Undo `open_output`: remove what we wrote, and the folder itself unless it `existed` before."""
    with saving(out):
        _clear(out)
        remove(out / TOOL_FOLDER / LOCK_FILE)
        (out / TOOL_FOLDER).rmdir()
        if not existed:
            out.rmdir()


def _is_ours(out: Path) -> bool:
    if all(path.name == TOOL_FOLDER and path.is_dir() for path in out.iterdir()):
        inside = [path.name for path in (out / TOOL_FOLDER).iterdir()]
        if all(name == LOCK_FILE or name.startswith(TEMP_PREFIX) for name in inside):
            return True  # a run of ours was killed before it could write its marker
    try:
        marker = json.loads((out / TOOL_FOLDER / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("tool") == _TOOL_NAME


def _clear(out: Path) -> None:
    """Remove what we wrote and nothing else; the marker goes last, so that the folder stays ours until the end."""
    for name in owned_files(out):
        remove(out / name)
    for path in (out / TOOL_FOLDER).iterdir():
        if path.name not in (RUN_FILE, _OWNED_FILE, LOCK_FILE):
            remove(path)
    for name in (_OWNED_FILE, RUN_FILE):
        remove(out / TOOL_FOLDER / name)


# --- publishing


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
        remove(out / last)  # killed from here on, the folder must not look like a model: old and new files are mixed
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, out / name)
        for name in set(before) - set(names):
            remove(out / name)
        write_json(out / TOOL_FOLDER / _OWNED_FILE, sorted(names))
        sync_folder(out)


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
    if not names <= set(before):
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
    if not ranks.is_main():
        return
    with saving(out):
        (out / TOOL_FOLDER / MANIFEST_FILE).unlink(missing_ok=True)


def is_complete(out: str | Path) -> bool:
    """Whether `out` holds a finished run whose files still have the sizes that the manifest tells."""
    try:
        files = read_manifest(out)["files"]
        return all((Path(out) / name).stat().st_size == size for name, size in files.items())
    except (OutputError, OSError):
        return False
