"""What saving a checkpoint and proving it will take: bytes by the disk's rate, a fresh process, and its forwards.

The proof (`proof.py`, `reload.py`) starts a process, reads the checkpoint and runs short texts through it: tokens of a
text read at once, and steps of a few tokens, in which all weights are read for hardly any arithmetic. The time of both
is measured on layers of the original. Sizes are bytes.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.reload import NUM_NEW_TOKENS, NUM_NEW_TOKENS_FROM_DISK, PROMPTS, cache_probe

if TYPE_CHECKING:
    from llm_streamline.plan import Plan
    from llm_streamline.sources import LoadedModel

START_SECONDS = 8.0  # stated: processor time of an interpreter that imports torch, transformers and a model's code
_PROBE_BYTES = 2**24
_PIECE = 2**20
_PROMPT_TOKENS = 12  # of one of the proof's prompts, about
_LOGIT_TOKENS = 96  # whose logits are compared, in both processes
_PROBE_LAYERS = 4  # enough to tell, on a model of any depth


@dataclass(frozen=True)
class DiskRates:
    """Bytes a second, past the page cache."""

    write: float
    read: float


STATED_DISK = DiskRates(write=200e6, read=500e6)  # a modest solid-state disk


@dataclass(frozen=True)
class ProofWork:
    """Forwards of the proof, in both processes: tokens in texts read at once, and steps of three tokens."""

    tokens: int
    steps: int
    passes: int  # how often all layers are gone through


@dataclass(frozen=True)
class SavingTime:
    """Seconds by part."""

    write: float  # the weights, and their reading back for the checksum
    start: float  # of the fresh process
    reload: float
    forwards: float

    @property
    def proof(self) -> float:
        """All but the saving."""
        return self.start + self.reload + self.forwards

    @property
    def seconds(self) -> float:
        """Saving and proof."""
        return self.write + self.proof


def disk_rates(folder: Path | None) -> DiskRates:
    """Measure the disk of a folder, or of the nearest one above it that exists, with a small file that has no name.

    Args:
        folder: where a checkpoint will be written; None: not known yet.

    Returns:
        The rates; stated ones where nothing can be written.
    """
    if folder is None:
        return STATED_DISK
    folder = folder.expanduser().absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    piece = os.urandom(_PIECE)  # a file system may pack what repeats itself, but not within so few bytes
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            started = time.perf_counter()
            written = sum(file.write(piece) for _ in range(_PROBE_BYTES // _PIECE))
            os.fsync(file.fileno())
            wrote = time.perf_counter()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            buffer, began, done = bytearray(_PIECE), time.perf_counter(), 0
            while count := file.readinto(buffer):
                done += count
            return DiskRates(written / max(wrote - started, 1e-9), done / max(time.perf_counter() - began, 1e-9))
    except OSError:
        return STATED_DISK


def step_seconds(loaded: "LoadedModel") -> float:
    """Seconds that one layer takes for a step of three tokens: the fastest of three tries on a few layers."""
    import torch

    from llm_streamline.arch import get_layers
    from llm_streamline.measure.partial import run_tapped

    ids = torch.zeros(3, 1, dtype=torch.long, device=loaded.device)
    num_layers, times = min(len(get_layers(loaded.model)), _PROBE_LAYERS), []
    with torch.inference_mode():
        for _ in range(3):
            started = time.perf_counter()
            states, _ = run_tapped(loaded.model, {"input_ids": ids}, stop=num_layers)
            float(states[num_layers].flatten()[0])  # waits for an accelerator
            times.append(time.perf_counter() - started)
    return min(times) / num_layers


def proof_work(config: Any, from_disk: bool) -> ProofWork:
    """Count the proof's forwards.

    Args:
        config: of the model; a sliding window makes the texts of the cache comparison longer.
        from_disk: layers stay on disk, so that less is written by the model.
    """
    longest, num_steps, _ = cache_probe(config)
    written = NUM_NEW_TOKENS_FROM_DISK if from_disk else NUM_NEW_TOKENS
    texts = len(PROMPTS) * _PROMPT_TOKENS
    uncached = sum(3 * (longest + step) for step in range(num_steps))
    return ProofWork(
        tokens=2 * _LOGIT_TOKENS + texts + 3 * longest + uncached,
        steps=written - 1 + num_steps - 1,  # the first token comes with the prompt
        passes=2 + written + 2 * num_steps,
    )


def saving_time(
    num_bytes: int,
    units: float,
    work: ProofWork,
    layer_seconds: float,
    seconds_per_step: float,
    disk: DiskRates,
    streamed_bytes: int = 0,
) -> SavingTime:
    """Put the estimate together.

    Args:
        num_bytes: of the checkpoint.
        units: its layers, and its head in units of a layer.
        work: of the proof.
        layer_seconds: one layer's forward over one token, among many.
        seconds_per_step: one layer's forward over a step of three tokens.
        disk: its rates.
        streamed_bytes: of the layers, where they stay on disk and every pass reads them.
    """
    computing = units * (work.tokens * layer_seconds + work.steps * seconds_per_step)
    return SavingTime(
        write=num_bytes / disk.write + (num_bytes + streamed_bytes) / disk.read,
        start=START_SECONDS,
        reload=(num_bytes - streamed_bytes) / disk.read,
        forwards=max(computing, work.passes * streamed_bytes / disk.read),
    )


def expected_saving_time(
    loaded: "LoadedModel", plan: "Plan", num_bytes: int, layer_seconds: float, out: Path | None
) -> SavingTime:
    """What saving and proving the model that `plan` leaves will take here.

    Args:
        loaded: the original.
        plan: what is done to it.
        num_bytes: of the checkpoint.
        layer_seconds: measured time of one layer's forward over one token.
        out: where the checkpoint will be written; None: not known yet, so that the disk's rates are stated ones.
    """
    from llm_streamline.arch import get_layers
    from llm_streamline.offload import is_streamed
    from llm_streamline.packed import num_numbers

    model, layers = loaded.model, get_layers(loaded.model)
    per_layer = sum(num_numbers(p) for p in layers.parameters()) / len(layers)
    head = num_numbers(model.get_output_embeddings().weight) / per_layer
    on_disk = is_streamed(model)
    streamed = round(plan.num_layers_after * per_layer * model.dtype.itemsize) if on_disk else 0
    return saving_time(
        num_bytes,
        plan.num_layers_after + head,
        proof_work(model.config, on_disk),
        layer_seconds,
        step_seconds(loaded),
        disk_rates(out),
        streamed,
    )
