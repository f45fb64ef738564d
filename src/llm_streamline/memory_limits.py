"""When memory ends: telling it from other errors, giving back what can be given back, going on with less at once."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from llm_streamline.errors import OutOfMemoryError
from llm_streamline.logs import get_logger

T = TypeVar("T")
log = get_logger()

_CPU_COMPLAINT = "not enough memory: you tried to allocate"  # torch's allocator on Windows


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an allocator could not give what was asked for, on whatever device."""
    if isinstance(problem, torch.OutOfMemoryError):
        return True
    return isinstance(problem, RuntimeError) and (should_reduce_batch_size(problem) or _CPU_COMPLAINT in str(problem))


def free_memory() -> None:
    """Return to the system what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trim := _trimmer():
        trim(0)


@cache
def _trimmer() -> Callable[[int], int] | None:
    """What makes glibc's allocator give freed pages back; None elsewhere."""
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim if sys.platform == "linux" else None
    except (OSError, AttributeError):  # musl
        return None


class BatchTooLarge(Exception):
    """A micro-batch did not fit into memory."""


@contextmanager
def no_room_for(count: int, unit: str = "windows") -> Iterator[None]:
    """Turn an allocator's complaint into `BatchTooLarge`, without what the failed computation still holds."""
    try:
        yield
        return
    except RuntimeError as problem:
        if not is_out_of_memory(problem):
            raise
        complaint = str(problem).splitlines()[0]
    raise BatchTooLarge(f"{count} {unit} at once: {complaint}")  # outside: the tensors are let go of


def out_of_memory(title: str, problem: str, way_out: str, can_stream: bool = True) -> OutOfMemoryError:
    """The error for what cannot be made smaller.

    Args:
        title: what was done, as in "out of memory in <title>".
        problem: what the allocator said.
        way_out: what would do, as in "shorten text.seq_len".
        can_stream: whether the same can be done with layers on disk.
    """
    ways = [way_out, *(["keep layers on disk with --max-memory auto"] if can_stream else [])]
    return OutOfMemoryError(
        f"out of memory in {title} ({problem}); {', '.join(ways)}, or use a machine with more memory"
    )


@contextmanager
def told_in_a_sentence(title: str, way_out: str, can_stream: bool = True) -> Iterator[None]:
    """Turn an allocator's complaint into an `OutOfMemoryError`, where nothing can be halved."""
    try:
        with no_room_for(1, "piece of work"):
            yield
    except BatchTooLarge as problem:
        said = str(problem).partition(": ")[2]
        raise out_of_memory(title, said, way_out, can_stream) from None


class Portions:
    """Batches that are run whole while memory suffices; once it does not, each is run in half as large portions.

    The work must leave nothing behind where it fails: its windows are run again.
    """

    def __init__(self, title: str, way_out: str, *, unit: str = "windows", can_stream: bool = True):
        """Begin with whole batches.

        Args:
            title: what is done, as in "out of memory in <title>".
            way_out: what would do when not even one window fits, as in "shorten text.seq_len".
            unit: what a batch is made of.
            can_stream: whether the work can be done with layers on disk.
        """
        self._title, self._way_out, self._unit, self._can_stream = title, way_out, unit, can_stream
        self._divisor = 1  # a batch of n windows is run n // divisor at a time

    def run(self, batch: Sequence, work: Callable[[Sequence], T]) -> list[T]:
        """Do the work on a batch.

        Args:
            batch: windows, or their numbers: whatever has a length and can be sliced; a tensor too.
            work: what is done with a slice of it.

        Returns:
            What `work` returned for each portion, in order.

        Raises:
            OutOfMemoryError: if not even one window fits.
        """
        found: list[T] = []
        done = 0
        while done < len(batch):
            portion = batch[done : done + max(1, len(batch) // self._divisor)]
            try:
                with no_room_for(len(portion), self._unit):
                    found.append(work(portion))
                done += len(portion)
                continue
            except BatchTooLarge as problem:
                self._halve(len(portion), len(batch), str(problem))
            free_memory()  # out here: the error that held on to the tensors is gone
        return found

    def _halve(self, failed: int, whole: int, problem: str) -> None:
        if failed == 1:
            raise out_of_memory(self._title, problem, self._way_out, self._can_stream) from None
        while max(1, whole // self._divisor) >= failed:
            self._divisor *= 2
        log.warning(
            "out of memory in %s with %d %s at once; going on with %d",
            self._title,
            failed,
            self._unit,
            max(1, whole // self._divisor),
        )
