"""The runs of a leaderboard, one after the other: a finished one is never repeated, a bad one does not stop the rest.

Each run is `compress` in a process of its own, so that memory is given back and a crash, even for want of memory, is
one recorded failure. The command that is recorded is the command that was run.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_streamline.errors import OutputError, StreamlineError
from llm_streamline.files import write_text
from llm_streamline.leaderboard.board import Entry
from llm_streamline.leaderboard.records import Record, Shelf, Status
from llm_streamline.logs import get_logger, progress_bar
from llm_streamline.output import is_complete

_GRACE_SECONDS = 120.0  # for a run that was asked to stop: it finishes its step and saves it
_DISK_FULL = "OutputError: the disk is full"
_LEAST_FREE = 64 * 1024  # bytes: hardly a results file
_TOLD_TO_STOP = (130, 143)  # exit codes of a run that a signal ended in good order
log = get_logger()


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    status: Status
    reason: str = ""


Runner = Callable[[Entry, Path, Path, Path, float | None], Ending]  # entry, recipe, out, log file, seconds left


def run_board(
    entries: Sequence[Entry],
    shelf: Shelf,
    *,
    fingerprints: Callable[[str], str],
    runner: Runner,
    limit_seconds: float | None = None,
    retry: bool = False,
    keep_weights: bool = False,
    after_each: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Run what is not done yet.

    Args:
        entries: the runs, in order.
        shelf: the leaderboard's folder.
        fingerprints: model source -> fingerprint; raises StreamlineError for a model that cannot be read.
        runner: makes one run.
        limit_seconds: when it is over, the run that is under way is stopped; the next call goes on.
        retry: also runs that were refused or failed before.
        keep_weights: leave the checkpoints in OUT/runs.
        after_each: called after every run that ended, to draw the page.

    Returns:
        One record for each entry, in the order of the entries.
    """
    started, records = time.monotonic(), []
    with progress_bar("leaderboard", len(entries)) as bar:
        for entry in entries:
            left = None if limit_seconds is None else limit_seconds - (time.monotonic() - started)
            record = recorded(entry, shelf, fingerprints)
            bar.note(entry.label)
            if record.status == "pending" or (retry and record.status in ("refused", "failed")):
                if left is not None and left <= 0:
                    record = record.model_copy(update={"status": "pending", "reason": "no time was left for it"})
                elif fingerprints_known(record):
                    shared = entry.measured_key(fingerprints(entry.source))
                    record = _run(entry, record, shelf, shared, runner, left, keep_weights)
                    after_each()
            records.append(record)
            bar.advance()
    return records


def fingerprints_known(record: Record) -> bool:
    """Whether the record is of a run that can be named: its model could be read."""
    return not record.key.startswith("unread-")


def recorded(entry: Entry, shelf: Shelf, fingerprints: Callable[[str], str]) -> Record:
    """The record of an entry as it stands; written, with its recipe, when it is new."""
    try:
        key = entry.key(fingerprints(entry.source))
        problem = ""
    except StreamlineError as refusal:
        key, problem = f"unread-{entry.key('')}", f"{type(refusal).__name__}: {refusal}"
    found = record = shelf.load(key)
    if record is not None and record.status == "done" and not shelf.has_result(key):
        record = record.model_copy(update={"status": "pending", "reason": "its results are gone"})
    if record is None:
        record = Record(
            key=key,
            model=entry.model,
            source=entry.source,
            method=entry.method,
            layers=entry.layers,
            tokens=entry.tokens,
            seed=entry.seed,
            note=entry.note,
            command=shlex.join(["llm-streamline", *_arguments(entry, shelf.recipe(key), shelf.run(key))]),
        )
    named = {name: getattr(entry, name) for name in ("model", "method", "note", "reference")}  # may change, content not
    record = record.model_copy(update=named)
    if problem:
        record = record.model_copy(update={"status": "refused", "reason": problem})
    write_text(shelf.recipe(key), f"# {entry.label}\n# run: {record.command}\n{entry.recipe_yaml()}")
    if record != found:  # whoever only looks must not write over what a call at work finds out meanwhile
        shelf.write(record)
    return record


def _run(
    entry: Entry, record: Record, shelf: Shelf, shared: str, runner: Runner, left: float | None, keep_weights: bool
) -> Record:
    log.info("%s", entry.label)
    key, started, stock = record.key, time.monotonic(), record.stock
    if not is_complete(shelf.run(key)):
        shelf.lend(shared, key)
        ending = runner(entry, shelf.recipe(key), shelf.run(key), shelf.log(key), left)
    else:
        ending = Ending("done")  # finished by a call that was killed before it could say so
    if ending.status == "done":
        shelf.borrow(shared, key)
        stock = shelf.take(key, keep_weights)
    else:
        log.warning("%s: %s: %s", entry.label, ending.status, ending.reason)
    seconds = round(record.seconds + time.monotonic() - started, 1)
    update = {"status": ending.status, "reason": ending.reason, "seconds": seconds, "stock": stock}
    record = record.model_copy(update=update)
    shelf.write(record)
    return record


def in_process_of_its_own(entry: Entry, recipe: Path, out: Path, log_file: Path, left: float | None) -> Ending:
    """Run `compress` as a user would, and tell from its exit code how it ended."""
    command = [sys.executable, "-m", "llm_streamline.cli", *_arguments(entry, recipe, out)]
    with log_file.open("a", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            _stop(process)
            return Ending("pending", "stopped by the time limit; the next call goes on where it was")
        except BaseException:
            _stop(process)
            raise
    if code == 0:
        return Ending("done")
    if code in _TOLD_TO_STOP:
        return Ending("pending", "stopped by a signal; the next call goes on where it was")
    if code == 2 and _disk_is_full(log_file):
        raise OutputError(f"the disk is full: free some space, then run again; {entry.label} goes on where it was")
    if code < 0:
        return Ending("failed", f"killed by {_signal_name(-code)}")
    return Ending("refused" if code == 2 else "failed", _last_line(log_file))


def _arguments(entry: Entry, recipe: Path, out: Path) -> list[str]:
    return ["compress", entry.source, "-o", str(out), "--recipe", str(recipe)]


def _stop(process: subprocess.Popen) -> None:
    process.terminate()  # not SIGINT: what a shell runs in the background ignores it
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _disk_is_full(log_file: Path) -> bool:
    """Whether the run said so, or could no longer say it: a run that found no room is not refused for good."""
    return _DISK_FULL in _last_line(log_file) or shutil.disk_usage(log_file).free < _LEAST_FREE


def _last_line(log_file: Path) -> str:
    lines = [line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")
