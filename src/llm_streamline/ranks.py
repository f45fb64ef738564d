"""Several processes at one run: who this one is, and the few things they tell each other.

`torchrun` and `accelerate launch` start the same command several times and number the processes by environment
variables; a process alone is rank 0 of 1, and everything here then does nothing. Rank 0 decides, writes and speaks; the
others work and obey. The engine is torch.distributed; the Trainer finds it started and uses it.

Two rules keep the ranks together. What every rank must agree on comes from rank 0 (`from_main`). What they measure is
dealt out in turn (`deal`) and collected in the order of the items (`collected`), so that sums are added in one order
and come out the same for any number of ranks.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from llm_streamline.errors import StreamlineError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # others may prepare text or save for hours; a dead rank is noticed by its connection
_FAILED = "llm_streamline_failed"  # in the store: how many ranks have failed or were stopped
_store: Any = None
_sharding = False
_depth_alone = 0  # how many blocks that one rank does alone we are in


def rank() -> int:
    """Number of this process; 0 decides, writes and speaks."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that work together here: those of the run, or 1 inside what one rank does alone."""
    return 1 if _depth_alone else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def start(device: str = "auto") -> None:
    """Join the other ranks; alone, or when joined before, this does nothing.

    Args:
        device: the run's device; on the CPU the ranks talk through gloo, on accelerators through NCCL as well.
    """
    global _store, _sharding
    if world_size() == 1:
        return
    # what accelerate's config says of FSDP is about the teacher; the Trainer would wrap the small network instead
    _sharding |= os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank())
    _store, number, size = next(dist.rendezvous("env://"))
    # objects and sums in float64 go through gloo, gradients through NCCL
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=_PATIENCE)
    atexit.register(_leave)


def wants_sharding() -> bool:
    """Whether the launcher's config asks for a model that is split over the ranks (`accelerate launch`, FSDP)."""
    return _sharding and world_size() > 1


def _leave() -> None:
    """Leave together: what a rank sent last is lost when it ends before the others have read it."""
    import torch.distributed as dist

    if not dist.is_initialized() or somebody_failed():
        return
    try:
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError:  # another rank ended otherwise, and has told why
        return


def local_rank() -> int:
    """Number of this process on its machine: the accelerator it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


# --- what rank 0 says


def from_main(make: Callable[[], T]) -> T:
    """Let rank 0 make something, and give every rank a copy.

    Raises:
        StreamlineError: on every rank, when rank 0 raises one.
    """
    if world_size() == 1:
        return make()
    import torch
    import torch.distributed as dist

    box: list[Any] = [None]
    if is_main():
        try:
            with _alone():
                box = [(True, make())]
        except StreamlineError as problem:
            box = [(False, problem)]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    made, value = box[0]
    if not made:
        raise value
    return value


def main_first(make: Callable[[], T]) -> T:
    """Let rank 0 make something, then the others: what it downloads, converts or writes is there for them.

    Raises:
        StreamlineError: on every rank, when rank 0 raises one.
    """
    made: list[T] = []
    from_main(lambda: made.append(make()))
    if made:
        return made[0]
    with _alone():
        return make()


@contextmanager
def _alone() -> Iterator[None]:
    """What one rank does alone must not wait for the others, whatever it calls."""
    global _depth_alone
    _depth_alone += 1
    try:
        yield
    finally:
        _depth_alone -= 1


def same_tensors(tensors: Iterable["torch.Tensor"]) -> None:
    """Overwrite tensors, in place, with those of rank 0."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


# --- sharing work


def deal(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield this rank's items, one of every `world_size()`, and whether the item is its own.

    Every rank is given equally many, because a sharded model only runs when all ranks run it: where the last round has
    too few, a rank without an item gets the round's first one with False, to be run and forgotten.
    """
    count = world_size()
    mine = rank() if count > 1 else 0
    rest = iter(items)
    while chunk := list(islice(rest, count)):
        yield chunk[mine if mine < len(chunk) else 0], mine < len(chunk)


def gathered(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def collected(found: list[T]) -> list[T]:
    """What all ranks found, one entry for each of their own items of `deal`, in the order of the items."""
    lists = gathered(found)
    return [lists[i % len(lists)][i // len(lists)] for i in range(sum(map(len, lists)))]


def summed(tensor: "torch.Tensor") -> "torch.Tensor":
    """The sum of a tensor over all ranks; the same bits on every rank."""
    if world_size() == 1:
        return tensor
    import torch.distributed as dist

    total = tensor.detach().cpu().clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


# --- failing


def first_to_fail() -> bool:
    """Whether no other rank failed or was stopped before this one: only the first tells why.

    The rest fail because it is gone: nobody waits for them (`_leave`), and the launcher ends them.
    """
    if world_size() == 1:
        return True
    if _store is None:  # not joined yet: what fails then fails on every rank alike
        return is_main()
    try:
        return _store.add(_FAILED, 1) == 1
    except RuntimeError:  # the store ended with the rank that kept it
        return False


def somebody_failed() -> bool:
    """Whether a rank has failed or was stopped, this one or another."""
    try:
        return _store is not None and _store.add(_FAILED, 0) > 0
    except RuntimeError:
        return True
