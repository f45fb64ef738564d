"""One run at a time in an output folder.

The lock is an advisory lock of the operating system on `streamline/lock.json`: it ends with its process, however that
ends, so a killed run or a crashed machine never leaves a folder locked, and no clock or age is looked at. The file says
who holds it. Where the file system knows no such locks, what the file says decides: a process that is gone, or that
belongs to an earlier boot of this machine, holds nothing.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_streamline.errors import OutputError
from llm_streamline.files import saving
from llm_streamline.logs import get_logger

try:
    import fcntl
except ImportError:  # Windows: what the file says decides
    fcntl = None

LOCK_FILE = "lock.json"
AT_WORK = "another run is at work in"  # how a refusal begins
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
log = get_logger()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` while the block runs.

    Args:
        folder: made if it is missing.

    Raises:
        OutputError: another run holds it; the message names its process and machine.
    """
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes of one run the first holds the folder for all
        yield
        return
    path = folder / LOCK_FILE
    with saving(folder):
        handle = _take(path)
    try:
        with saving(path):
            before = _holder(handle)
            _write(handle, json.dumps(_myself()).encode())
        if before:
            log.info("the run that was here before (%s) is gone; going on from what it left", _name(before))
        yield
    finally:
        if fcntl is None:  # an open file cannot be removed there
            os.close(handle)
            path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)  # before the lock ends: whoever opens it now makes a file of his own
            os.close(handle)


def _write(handle: int, content: bytes) -> None:
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, content)
    os.ftruncate(handle, len(content))


def _take(path: Path) -> int:
    """An open, locked handle of the lock file."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was withdrawn by the run that held it, just now
            continue
        try:
            is_free = _lock(handle)
            holder = _holder(handle)
            if is_free is False or (is_free is None and holder and _is_alive(holder)):
                raise OutputError(_refusal(path, holder, sure=is_free is False))
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle  # else the run that held it ended, and took the file away, while we opened it
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the lock is ours now; None where the system knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def _refusal(path: Path, holder: dict[str, Any], *, sure: bool) -> str:
    out = path.parent.parent
    advice = "wait for it or stop it, or choose another folder"
    if not sure and holder["host"] != socket.gethostname():
        advice += f"; if it is gone, delete {path}"
    return f"{AT_WORK} {out}: {_name(holder)}; {advice}"


def _holder(handle: int) -> dict[str, Any]:
    """What the file says of its last holder; {} when it says nothing that can be read."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        content = json.loads(os.read(handle, 4096))
    except (OSError, ValueError):
        return {}
    kinds = {"pid": int, "host": str, "boot": str, "born": str}
    fits = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    return content if fits else {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "its process is not named yet"


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "born": _born(os.getpid())}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder still runs, as far as can be told from here: a process of another machine counts as alive."""
    if holder["host"] != socket.gethostname():
        return True
    import psutil

    same_boot = holder["boot"] == _boot()
    return same_boot and psutil.pid_exists(holder["pid"]) and holder["born"] == _born(holder["pid"])


def _boot() -> str:
    """What tells one boot of this machine from another; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process began, in clock ticks since boot, which no change of the clock moves: tells a reused pid."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
