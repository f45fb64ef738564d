"""What a Hugging Face folder's weight files hold, read from their headers alone and believed only after checking.

A safetensors file is: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the
data. A truncated download, a shard that is not there or an index that points elsewhere is found here in milliseconds,
before any tensor is read.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from llm_streamline.errors import SourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file's header announces it."""

    dtype: str  # as safetensors spells it, e.g. "BF16"
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """The weight files of one model, in name order, and all their tensors."""

    files: tuple[Path, ...]
    tensors: dict[str, TensorHeader]

    @property
    def num_elements(self) -> int:
        """Numbers stored in all files together; tied tensors are stored once."""
        return sum(header.num_elements for header in self.tensors.values())

    @property
    def num_layers(self) -> int:
        """Length of the longest numbered run of modules in the tensors' names: the decoder layers, as a rule."""
        members: dict[str, set[int]] = {}
        for name in self.tensors:
            match = re.match(r"((?:[^.\d][^.]*\.)*)(\d{1,9})\.", name)
            if match:
                members.setdefault(match[1], set()).add(int(match[2]))
        return max(map(len, members.values()), default=0)


def read_json(path: Path) -> dict:
    """Read a JSON object from a file of the model.

    Raises:
        SourceError: not readable, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a JSON {type(value).__name__}, not an object; download the model again")
    return value


def check_inside(folder: Path, name: str, named_by: str) -> Path:
    """Return `folder/name` when that is a file of this model, symlinks followed.

    A Hub snapshot consists of links into the `blobs` folder beside it, so these two places are allowed.

    Raises:
        SourceError: `name` is not a plain file name, is missing, or leads out of the folder.
    """
    leaves = not name or "\0" in name or len(PurePosixPath(name).parts) != 1 or len(PureWindowsPath(name).parts) != 1
    if leaves or name in (".", ".."):
        raise SourceError(f"{named_by} names {name!r}, which is not a file inside {folder}; refusing to follow it")
    path = folder / name
    try:
        if not path.is_file():
            raise SourceError(f"{named_by} names {name}, which is missing from {folder}; download the model again")
        home, target = folder.resolve(), path.resolve()
    except OSError as error:  # a name too long for the file system, a loop of links
        raise SourceError(f"{named_by} names {name[:80]!r}, which cannot be opened: {error.strerror}") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise SourceError(f"{path} is a link to a file outside the model's folder; copy the file into {folder}")
    return path


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Read and check the header of one safetensors file; the data is not read.

    Raises:
        SourceError: the file is truncated, has bytes too many, or its header does not describe its data.
    """
    again = "download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise SourceError(f"{path} is truncated or not safetensors: {size} bytes, header of {length}; {again}")
            if length > _MAX_HEADER_BYTES:
                raise SourceError(f"{path} announces a header of {length} bytes, which is absurd; {again}")
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SourceError(f"the header of {path} is corrupt ({error}); {again}") from error
    if not isinstance(header, dict):
        raise SourceError(f"the header of {path} is not an object; {again}")
    header.pop("__metadata__", None)
    tensors, extents = {}, []
    for name, entry in header.items():
        start, stop, tensors[name] = _check_entry(path, name, entry)
        extents.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(extents):
        if start != end:
            raise SourceError(f"the data of tensor {name} in {path} overlaps another or leaves a hole; {again}")
        end = stop
    if end != size - 8 - length:
        raise SourceError(
            f"{path} is {'truncated' if end > size - 8 - length else 'too long'}: its header describes {end} bytes of "
            f"data, the file holds {size - 8 - length}; {again}"
        )
    return tensors


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _check_entry(path: Path, name: str, entry: object) -> tuple[int, int, TensorHeader]:
    def is_counts(value: object) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

    if not isinstance(entry, dict) or not is_counts(entry.get("shape")) or not is_counts(entry.get("data_offsets")):
        raise SourceError(f"the header of {path} describes tensor {name!r} wrongly; download it again")
    dtype, shape, offsets = entry.get("dtype"), entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise SourceError(f"tensor {name!r} in {path} has the unknown dtype {dtype!r}; download it again")
    if len(shape) > 64 or len(offsets) != 2 or math.prod(shape) * _BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise SourceError(
            f"tensor {name!r} in {path} is announced as {dtype} {shape} at bytes {offsets}, which do not agree; "
            "download it again"
        )
    return offsets[0], offsets[1], TensorHeader(dtype, tuple(shape))


def read_weights(folder: Path) -> Weights:
    """Find the safetensors files of a Hugging Face folder and check their headers against each other.

    As transformers does, `model.safetensors` is taken first, then the files that the index names.

    Raises:
        SourceError: no weights, pickled weights, a PEFT adapter, a missing or corrupt file, an index that disagrees.
    """
    if (folder / SINGLE_FILE).is_file() or (folder / SINGLE_FILE).is_symlink():
        path = check_inside(folder, SINGLE_FILE, str(folder))
        tensors = read_header(path)
        if not tensors:
            raise SourceError(f"{path} holds no tensors; download it again")
        return Weights((path,), tensors)
    if not (folder / INDEX_FILE).exists():
        raise SourceError(_why_no_weights(folder))
    index = read_json(check_inside(folder, INDEX_FILE, str(folder)))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / INDEX_FILE} has no weight_map; download the model again")
    names = sorted({str(name) for name in weight_map.values()})
    files = tuple(check_inside(folder, name, INDEX_FILE) for name in names)
    tensors: dict[str, TensorHeader] = {}
    held_by: dict[str, str] = {}
    for path in files:
        if path.suffix != ".safetensors":
            raise SourceError(f"{INDEX_FILE} names {path.name}, which is not a safetensors file; refusing to open it")
        for name, header in read_header(path).items():
            if name in tensors:
                raise SourceError(f"tensor {name} is in both {held_by[name]} and {path.name}; download the model again")
            tensors[name], held_by[name] = header, path.name
    for name, file_name in weight_map.items():
        if held_by.get(name) != file_name:
            raise SourceError(f"{INDEX_FILE} says tensor {name} is in {file_name}, but it is not; download it again")
    return Weights(files, tensors)


def _why_no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") and name.startswith("model-") for name in names):
        return f"{folder} has shards but no {INDEX_FILE}; download the model again"
    if "adapter_config.json" in names:
        return f"{folder} holds a PEFT adapter, not a model; merge it into its base model first"
    pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES) and name != "training_args.bin"]
    if pickled:
        return (
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when opened and are refused; convert "
            "them to safetensors in a place you trust (load with transformers, then save_pretrained)"
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return f"{folder} holds GGUF files; name the file itself, e.g. {folder / ggufs[0]}"
    return f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}; is it the folder of a model?"
