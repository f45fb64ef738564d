"""Being told to stop: SIGINT (Ctrl-C) or SIGTERM (a scheduler) ends a run cleanly, the second one at once.

Everything a run leaves is written whole or not at all, so it may be left nearly anywhere: the signal becomes an
exception. Only in training is it held back, until the step's forward or the end of the step, so that a checkpoint of
the last finished step can be written first. A library does not take over signals: the command line does.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llm_streamline import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE = b"stopping: what is done is kept; once more stops at once\n"


class Stopped(BaseException):
    """The run was told to stop. No `Exception`: what handles errors must not take it for one."""

    def __init__(self, number: int):
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number  # as a shell tells of a process that a signal ended: 130 and 143
        self.agreed = _State.agreed


class _State:
    """What this process was told."""

    owner = 0  # the process that watches: one that is forked from it inherits the handlers
    told: int | None = None  # the first signal
    agreed = False  # whether all processes of the run stop at the same place
    depth = 0  # how many blocks hold it back


@contextmanager
def watched() -> Iterator[None]:
    """Turn signals into `Stopped` while the block runs; a signal that is ignored (nohup, a background job) stays so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.owner, _State.told, _State.agreed, _State.depth = os.getpid(), None, False, 0
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, _on_signal)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.told = None


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _State.told is not None or os.getpid() != _State.owner:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _State.told = number
    if ranks.is_main():
        os.write(2, _GRACE)  # a print might find the stream in the middle of another one
    check()


def agree() -> None:
    """Stop at the next place where that is allowed, as all processes of the run do: one of them was told to."""
    _State.told, _State.agreed = _State.told or signal.SIGTERM, True


def is_requested() -> bool:
    """Whether the run was told to stop and has not stopped yet."""
    return _State.told is not None


def check() -> None:
    """Stop here if that was asked for and nothing holds it back.

    Raises:
        Stopped: it was.
    """
    if _State.told is not None and not _State.depth:
        raise Stopped(_State.told)


@contextmanager
def held_back() -> Iterator[None]:
    """Around what must not be left half done: a signal takes effect at its end, or where the block `allows` it."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    check()


@contextmanager
def allowed() -> Iterator[None]:
    """Inside `held_back`: around what may be left at once."""
    depth, _State.depth = _State.depth, 0
    try:
        check()
        yield
    finally:
        _State.depth = depth
