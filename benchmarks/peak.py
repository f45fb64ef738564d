"""Run a command and watch the anonymous memory (page cache excluded) of its process and all processes below it."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_INTERVAL = 0.02  # seconds between samples


@dataclass(frozen=True)
class Watched:
    """What was seen."""

    returncode: int
    seconds: float
    peak_bytes: int  # of the sum over the processes
    output: str  # stdout and stderr together


def watch(command: list[str], log: Path) -> Watched:
    """Run `command`, its output going to the file `log`, and sample its memory until it ends."""
    started, peak = time.perf_counter(), 0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(_anonymous(pid) for pid in _family(process.pid)))
            time.sleep(_INTERVAL)
    return Watched(process.returncode, time.perf_counter() - started, peak, log.read_text(errors="replace"))


def _family(pid: int) -> list[int]:
    """A process and those it started, at any depth."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [member for child in task.read_text().split() for member in _family(int(child))]
        except OSError:
            continue  # it ended while we looked
    return found


def _anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it ended while we looked
    return 0
