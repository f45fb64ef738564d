"""The original's hidden states on disk: what a network is given and what it should make of it, computed once.

An MSE training needs of the original only the state that enters the span and the one that leaves it. With a cache they
are computed once, in large batches, and mapped from disk in every epoch and every run with the same key; without one
they are computed anew in every step. States are kept in the model's dtype (bfloat16 as a rule), as they would be used,
so that both ways give the same losses.

Files in DIR/KEY/: states-NNNNN.safetensors with `input` (n, T, d) and `targets` (n, S, T, d), and manifest.json, which
is written anew after each of them: a killed run goes on where it was. Shapes: W windows, T tokens, d width, S spans.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_streamline.data.windows import Windows
from llm_streamline.errors import ConfigError
from llm_streamline.files import check_room, sha256_of, write_json, write_tensors
from llm_streamline.logs import get_logger, progress_bar
from llm_streamline.measure.partial import run_tapped
from llm_streamline.measure.stream import WAY_OUT
from llm_streamline.memory_limits import Portions
from llm_streamline.runs.lock import locked
from llm_streamline.sizes import as_size

FORMAT = 1
MANIFEST = "manifest.json"
_SHARD_BYTES = 2**28  # held in memory while a shard is filled
log = get_logger()


@dataclass(frozen=True)
class StateRequest:
    """Which states are wanted: everything they depend on."""

    model: str  # fingerprint, and how it is run
    dtype: str
    windows: str  # sha256 of the token ids
    num_windows: int
    seq_len: int
    width: int
    enters: int  # boundary whose state a network is given
    leaves: tuple[int, ...]  # boundaries whose states it should make, one for each span

    @property
    def key(self) -> str:
        """sha256 of the request."""
        text = json.dumps([FORMAT, vars(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def window_bytes(self) -> int:
        """Of the states of one window."""
        element = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return (1 + len(self.leaves)) * self.seq_len * self.width * element

    @property
    def shard_windows(self) -> int:
        """Windows in a shard, the last one excepted."""
        return max(1, _SHARD_BYTES // self.window_bytes)


def check_cacheable(objective: dict[str, float], trainable: str) -> None:
    """Refuse to cache states for a training that needs more of the original than them.

    Raises:
        ConfigError: the objective is not mse alone, or weights of the original are trained.
    """
    if set(objective) != {"mse"} or trainable not in ("auto", "replacement"):
        wanted = "+".join(objective) if trainable in ("auto", "replacement") else f"training.trainable: {trainable}"
        raise ConfigError(
            f"--cache-states keeps what a network is given and should make of it, which is all that the objective mse "
            f"needs, but not enough for {wanted}: use --objective mse, or leave --cache-states out"
        )


class CachedStates:
    """States of a request, mapped from disk."""

    def __init__(self, folder: Path, request: StateRequest):
        self._request = request
        count = -(-request.num_windows // request.shard_windows)
        self._shards = [load_file(folder / _shard_name(number)) for number in range(count)]

    def __len__(self) -> int:
        return self._request.num_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """States of one window: `input` (T, d) and `targets` (S, T, d)."""
        number, row = divmod(index, self._request.shard_windows)
        return {name: tensor[row] for name, tensor in self._shards[number].items()}


@torch.no_grad()
def cached_states(
    model: nn.Module, windows: Windows, request: StateRequest, folder: Path, batch_tokens: int
) -> CachedStates:
    """Return the states of a request, from the cache in `folder` or computed into it.

    Args:
        model: the original.
        windows: at least `request.num_windows`.
        request: which states.
        folder: the cache; requests live beside each other in it.
        batch_tokens: tokens run at once.

    Raises:
        OutputError: the disk has too little room, the folder cannot be written, or another run is computing these.
    """
    place = folder.expanduser() / request.key[:16]
    if len(_sound_shards(place, request)) * request.shard_windows < request.num_windows:
        with locked(place):
            _fill(model, windows, request, place, batch_tokens)
    else:
        log.info("hidden states: computed before, taken from %s", place)
    return CachedStates(place, request)


def _fill(model: nn.Module, windows: Windows, request: StateRequest, place: Path, batch_tokens: int) -> None:
    """Compute the shards that are not there."""
    done = _sound_shards(place, request)
    starts = range(0, request.num_windows, request.shard_windows)
    size = request.num_windows * request.window_bytes
    missing = (len(starts) - len(done)) * request.shard_windows * request.window_bytes
    log.info("hidden states of %d windows take %s in %s", request.num_windows, as_size(size), place)
    check_room(place, min(size, missing))
    per_batch = max(1, batch_tokens // request.seq_len)
    with progress_bar("hidden states", request.num_windows) as bar:
        bar.advance(min(request.num_windows, len(done) * request.shard_windows))
        for start in starts[len(done) :]:
            stop = min(start + request.shard_windows, request.num_windows)
            tensors = _compute(model, windows.input_ids[start:stop], request, per_batch, bar.advance)
            done.append(_write_shard(place / _shard_name(len(done)), tensors))
            del tensors
            write_json(place / MANIFEST, _manifest(request, done))


def _compute(
    model: nn.Module, ids_WT: Tensor, request: StateRequest, per_batch: int, advance: Any
) -> dict[str, Tensor]:
    """States of some windows, in batches."""
    shape, dtype = (request.seq_len, request.width), getattr(torch, request.dtype)
    tensors = {
        "input": torch.empty(len(ids_WT), *shape, dtype=dtype),
        "targets": torch.empty(len(ids_WT), len(request.leaves), *shape, dtype=dtype),
    }
    device = model.get_input_embeddings().weight.device
    wanted = {request.enters, *request.leaves}
    portions = Portions("computing hidden states", WAY_OUT)

    def fill(numbers: range) -> None:
        rows = slice(numbers.start, numbers.stop)
        ids = torch.as_tensor(ids_WT[rows]).to(device, torch.long)
        states, _ = run_tapped(model, {"input_ids": ids}, wanted, stop=max(wanted))
        tensors["input"][rows] = states[request.enters].cpu()
        for number, boundary in enumerate(request.leaves):
            tensors["targets"][rows, number] = states[boundary].cpu()

    for start in range(0, len(ids_WT), per_batch):
        batch = range(len(ids_WT))[start : start + per_batch]
        portions.run(batch, fill)
        advance(len(batch))
    return tensors


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    write_tensors(path, tensors)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _sound_shards(place: Path, request: StateRequest) -> list[dict[str, Any]]:
    """The shards, from the first on, that an earlier run finished and that are still what it wrote."""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        listed = manifest["shards"] if manifest["key"] == request.key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    sound = []
    for number, entry in enumerate(listed):
        path = place / _shard_name(number)
        try:
            if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                raise ValueError("the checksum differs")
            load_file(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            log.warning("%s is damaged (%s): computed anew from there", path, problem)
            break
        sound.append(entry)
    return sound


def _manifest(request: StateRequest, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"format": FORMAT, "key": request.key, "request": vars(request), "shards": list(shards)}


def _shard_name(number: int) -> str:
    return f"states-{number:05d}.safetensors"
