"""When memory ends: telling it from other errors, and giving back what can be given back."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

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


class BatchTooLarge(Exception):
    """A micro-batch did not fit into memory."""


@contextmanager
def no_room_for(num_windows: int) -> Iterator[None]:
    """Turn an allocator's complaint into `BatchTooLarge`, without what the failed computation still holds."""
    try:
        yield
        return
    except RuntimeError as problem:
        if not is_out_of_memory(problem):
            raise
        complaint = str(problem).splitlines()[0]
    raise BatchTooLarge(f"{num_windows} windows at once: {complaint}")  # outside: the tensors are let go of
