"""Windows: tokens packed to equal lengths, with document boundaries and their history; two files, memory-mapped.

Shapes: W windows, T tokens in a window, D documents. Files: NAME.safetensors holds `input_ids` (W, T) int32,
`document_ids` (W, T) int32 and `document_hashes` (D, 32) uint8; NAME.json holds the provenance and is written last.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_streamline.data.store import TensorSpool, write_tensors
from llm_streamline.errors import TextError
from llm_streamline.output import write_json

HASH_BYTES = 32
_TENSORS = {"input_ids": torch.int32, "document_ids": torch.int32, "document_hashes": torch.uint8}
_TIES = ("sha256", "key")


def _no_hashes() -> torch.Tensor:
    return torch.empty((0, HASH_BYTES), dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens of one role.

    `document_ids` numbers the documents from 0 in the order they come; a boundary lies wherever the number changes.
    """

    input_ids: torch.Tensor  # (W, T) int32; may be a memory map
    document_ids: torch.Tensor = None  # (W, T) int32; left out: one document a window
    document_hashes: torch.Tensor = field(default_factory=_no_hashes)  # (D, 32) uint8, sha256 of each document
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.document_ids is None:
            num_windows, seq_len = self.input_ids.shape
            ids = torch.arange(num_windows, dtype=torch.int32)[:, None].expand(num_windows, seq_len)
            object.__setattr__(self, "document_ids", ids)
        assert self.input_ids.shape == self.document_ids.shape, "one document number for each token"

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens in a window."""
        return self.input_ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows."""
        return self.input_ids.numel()

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Yield (up to batch_size, T) int64 token ids, in order."""
        for ids in self.input_ids.split(batch_size):
            yield ids.to(torch.int64)

    def save(self, path: str | Path) -> None:
        """Write `path`.safetensors and `path`.json, each at once or not at all.

        Raises:
            OutputError: if they cannot be written.
        """
        tensors = {name: getattr(self, name).contiguous().numpy() for name in _TENSORS}
        sha256 = hashlib.sha256(tensors["input_ids"].tobytes()).hexdigest()
        _write(Path(path), tensors, {**self.provenance, "sha256": sha256})

    @classmethod
    def load(cls, path: str | Path) -> "Windows":
        """Map the tokens of a saved set into memory; nothing is read before it is used.

        Raises:
            TextError: if a file is missing, cut short or does not belong to the other.
        """
        from safetensors import SafetensorError, safe_open

        tensors_path, json_path = _paths(Path(path))
        try:
            provenance = json.loads(json_path.read_text(encoding="utf-8"))
            with safe_open(tensors_path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                ties = file.metadata() or {}
        except FileNotFoundError:
            raise TextError(f"no windows at {path}: {tensors_path.name} and {json_path.name} belong together") from None
        except (OSError, ValueError, SafetensorError) as problem:
            raise TextError(
                f"the windows at {path} are damaged ({problem}); delete them to have them made anew"
            ) from None
        kinds = {name: tensor.dtype for name, tensor in tensors.items()}
        tied = isinstance(provenance, dict) and all(provenance.get(name, "") == ties.get(name) for name in _TIES)
        if not tied or kinds != _TENSORS:
            raise TextError(
                f"{tensors_path} and {json_path.name} do not belong together; delete them to have them made anew"
            )
        return cls(**tensors, provenance=provenance)


@dataclass
class _Part:
    """Tokens of one document that wait for a window."""

    ids: np.ndarray
    document_hash: str
    source: int
    number: int | None = None  # given when the document's first token enters a window


class WindowWriter:
    """Packs documents into windows as they come. With a folder, tokens go to disk at once and memory stays small."""

    def __init__(self, seq_len: int, num_windows: int, folder: Path | None = None, across_documents: bool = True):
        """Open a set.

        Args:
            seq_len: tokens in a window.
            num_windows: windows wanted; tokens beyond them are dropped.
            folder: where to spool; None keeps the tokens in memory.
            across_documents: False starts each document in a new window and drops what does not fill one.
        """
        self._seq_len, self._num_windows, self._across = seq_len, num_windows, across_documents
        self._ids, self._documents = TensorSpool(folder), TensorSpool(folder)
        self._sha256 = hashlib.sha256()
        self._waiting: list[_Part] = []
        self._num_waiting = 0
        self._hashes = bytearray()
        self.num_windows = 0  # written
        self.num_documents = 0  # with a token in a window
        self.tokens_of_source: Counter[int] = Counter()  # in windows, by the source's number
        self.documents_of_source: Counter[int] = Counter()

    @property
    def is_full(self) -> bool:
        """Whether there are as many windows as asked for."""
        return self.num_windows >= self._num_windows

    def add(self, ids: np.ndarray, document_hash: str, source: int = 0) -> None:
        """Append one document's (number of tokens,) int32 ids; `source` is the number of the source it is from."""
        if not self._across:
            self._waiting, self._num_waiting = [], 0
        self._waiting.append(_Part(ids, document_hash, source))
        self._num_waiting += len(ids)
        if self._num_waiting >= self._seq_len and not self.is_full:
            self._write_windows()

    def _write_windows(self) -> None:
        count = min(self._num_waiting // self._seq_len, self._num_windows - self.num_windows)
        room = count * self._seq_len
        ids, documents, rest = [], [], []
        for part in self._waiting:
            taken = part.ids[:room]
            room -= len(taken)
            if len(taken):
                self._number(part)
                self.tokens_of_source[part.source] += len(taken)
                ids.append(taken)
                documents.append(np.full(len(taken), part.number, np.int32))
            if len(taken) < len(part.ids):
                rest.append(replace(part, ids=part.ids[len(taken) :]))
        written = np.concatenate(ids)
        self._ids.write(written)
        self._documents.write(np.concatenate(documents))
        self._sha256.update(written.tobytes())
        self._waiting, self._num_waiting = rest, self._num_waiting - len(written)
        self.num_windows += count

    def _number(self, part: _Part) -> None:
        if part.number is None:
            part.number = self.num_documents
            self.num_documents += 1
            self.documents_of_source[part.source] += 1
            self._hashes += bytes.fromhex(part.document_hash)

    def finish(self, provenance: dict[str, Any], path: Path | None = None) -> Windows:
        """Close the set: written to `path` and mapped from there, or kept in memory where there is none.

        Raises:
            OutputError: if it cannot be written.
        """
        tensors = {
            "input_ids": self._ids.array(np.int32).reshape(-1, self._seq_len),
            "document_ids": self._documents.array(np.int32).reshape(-1, self._seq_len),
            "document_hashes": np.frombuffer(bytes(self._hashes), np.uint8).reshape(-1, HASH_BYTES),
        }
        provenance = {**provenance, "sha256": self._sha256.hexdigest()}
        if path is None:
            return Windows(**{name: torch.from_numpy(a.copy()) for name, a in tensors.items()}, provenance=provenance)
        _write(path, tensors, provenance)
        self.close()
        return Windows.load(path)

    def close(self) -> None:
        """Give temporary files back."""
        self._ids.close()
        self._documents.close()


def check_disjoint(a: Windows, b: Windows) -> None:
    """Make sure that no document is in both sets.

    Raises:
        TextError: if there is one.
    """
    rows = [np.ascontiguousarray(w.document_hashes.numpy()).view(f"V{HASH_BYTES}")[:, 0] for w in (a, b)]
    shared = set(rows[0].tolist()) & set(rows[1].tolist())
    if shared:
        names = " and ".join(str(w.provenance.get("role", "a set of windows")) for w in (a, b))
        raise TextError(
            f"{names} share {len(shared)} documents (one has the hash {min(shared).hex()[:12]}); "
            "make the sets in one call, or from texts that do not overlap"
        )


def _paths(path: Path) -> tuple[Path, Path]:
    stem = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(f"{stem}.safetensors"), path.with_name(f"{stem}.json")


def _write(path: Path, tensors: dict[str, np.ndarray], provenance: dict[str, Any]) -> None:
    # both files carry these: killed between the two writes, new tensors are not taken for those of the old history
    tensors_path, json_path = _paths(path)
    write_tensors(tensors_path, tensors, {name: provenance.get(name, "") for name in _TIES})
    write_json(json_path, provenance)
