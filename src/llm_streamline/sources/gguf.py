"""A GGUF file as a source: its header checked, its weights dequantised once into a cached Hugging Face folder.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is walked with bounds on every count, so
that a truncated or hostile file gives one sentence and neither a hang nor an allocation.
"""

import math
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import MissingExtraError, OutputError, SourceError, StreamlineError
from llm_streamline.files import saving
from llm_streamline.logs import get_logger
from llm_streamline.quiet import quiet_transformers
from llm_streamline.sources.weights import read_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE_VARIABLE = "LLM_STREAMLINE_CACHE"
_CONVERSION = 1  # part of a cached folder's name; raised when the same file would be converted differently
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NOT_DECODERS = ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "neo-bert", "modern-bert", "t5", "t5encoder")


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data: metadata (long arrays only counted) and the types of its tensors."""

    metadata: dict[str, Any]
    tensor_types: dict[str, int]  # tensor name -> number of its ggml type

    @property
    def architecture(self) -> str:
        """The family's name in llama.cpp's spelling."""
        return str(self.metadata.get("general.architecture", ""))


class _Reader:
    """A cursor over the file that never reads past its end."""

    def __init__(self, path: Path):
        import mmap

        self.path, self.position = path, 0
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read {path}: {error}") from error

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise SourceError(f"{self.path} is truncated or corrupt at byte {self.position}; download it again")
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, limit: int) -> str:
        length = self.number("Q")
        if length > limit:
            raise SourceError(f"{self.path} holds a name of {length} bytes, which is absurd; download it again")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text(limit=2**26)
        if kind != _ARRAY or depth > 4:
            raise SourceError(f"{self.path} holds metadata of the unknown type {kind}; download it again")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[element])
            raw = self.take(count * width)
            return list(struct.unpack(f"<{count}{_SCALARS[element]}", raw)) if count <= 4096 else count
        if count * 8 > self.size - self.position:  # each element takes 8 bytes at least
            raise SourceError(f"{self.path} announces an array of {count} elements it cannot hold; download it again")
        values = [self.value(element, depth + 1) for _ in range(count)]
        return values if count <= 4096 else count


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a GGUF file's header and check that every tensor it announces lies inside the file.

    Raises:
        SourceError: not GGUF, truncated, corrupt, one part of several, or not a decoder-only language model.
        MissingExtraError: the package `gguf`, which knows the sizes of ggml types, is not installed.
    """
    block_sizes = _block_sizes()
    reader = _Reader(path)
    if reader.take(min(4, reader.size)) != b"GGUF":
        raise SourceError(f"{path} is not a GGUF file: it does not start with GGUF; download it again")
    version, num_tensors, num_entries = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise SourceError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, can be read")
    metadata = {}
    for _ in range(num_entries):
        name = reader.text(limit=2**16)
        metadata[name] = reader.value(reader.number("I"))
    extents = {}
    types = {}
    for _ in range(num_tensors):
        name, num_dims = reader.text(limit=2**16), reader.number("I")
        if num_dims > 8:
            raise SourceError(f"tensor {name!r} in {path} has {num_dims} dimensions; download it again")
        shape = [reader.number("Q") for _ in range(num_dims)]
        types[name], offset = reader.number("I"), reader.number("Q")
        if types[name] not in block_sizes:
            raise SourceError(f"tensor {name!r} in {path} has the unknown ggml type {types[name]}")
        extents[name] = (offset, shape, *block_sizes[types[name]])
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise SourceError(f"{path} has the impossible alignment {alignment!r}; download it again")
    start = math.ceil(reader.position / alignment) * alignment
    for name, (offset, shape, block_elements, block_bytes) in extents.items():
        num_elements = math.prod(shape)
        end = start + offset + num_elements // block_elements * block_bytes
        if num_elements == 0 or num_elements % block_elements or end > reader.size:
            raise SourceError(
                f"{path} is truncated or corrupt: tensor {name!r} should end at byte {end}, the file has "
                f"{reader.size}; download it again"
            )
    header = GgufHeader(metadata, types)
    _check_is_decoder(path, header)
    return header


def _check_is_decoder(path: Path, header: GgufHeader) -> None:
    if not header.architecture or not header.tensor_types:
        raise SourceError(f"{path} holds no model: it names no architecture or has no tensors")
    if header.architecture in _NOT_DECODERS:
        raise SourceError(f"{path} is a {header.architecture} model, not a decoder-only language model")
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise SourceError(f"{path} is one of {parts} parts; join them first with `llama-gguf-split --merge`")


def _block_sizes() -> dict[int, tuple[int, int]]:
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingExtraError(
            'reading GGUF files needs the package gguf: pip install "llm-streamline[gguf]"'
        ) from error
    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}


def cache_folder() -> Path:
    """Where converted models are kept: `$LLM_STREAMLINE_CACHE`, else `llm-streamline` in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-streamline"


def converted_folder(path: Path, fingerprint: str) -> Path:
    """Return a Hugging Face folder with the dequantised model of a GGUF file; converted on the first call only.

    Weights are kept as bfloat16, or as the file's own float16 or float32 where its matrices are not quantised.

    Args:
        path: the GGUF file.
        fingerprint: what identifies its contents; the cached folder is named after it.

    Raises:
        SourceError: transformers cannot read this file, or the cache cannot be written.
    """
    header = read_gguf_header(path)
    folder = cache_folder() / "gguf" / f"{path.stem[:60]}-{fingerprint[:16]}-v{_CONVERSION}"
    if folder.is_dir():
        try:
            read_weights(folder)
        except SourceError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged since it was written: convert again
        else:
            return folder
    get_logger(__name__).info("converting %s once into %s", path.name, folder)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        model, tokenizer = _convert(path, header)
        with quiet_transformers(), saving(folder):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # when another process was faster its folder is as good as ours
                raise
    except (OSError, OutputError) as error:
        said = getattr(error, "strerror", None) or error
        raise SourceError(
            f"cannot keep the converted model in {folder.parent}: {said}; set {CACHE_VARIABLE} to a folder with room"
        ) from error
    except StreamlineError:
        raise
    except Exception as error:  # a foreign parser on foreign data: whatever it raises, the file cannot be read
        raise SourceError(f"transformers cannot read {path}: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _convert(path: Path, header: GgufHeader) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    dtype = _stored_dtype(header)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options, **_dequantise())
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    _forget_quantisation(model)
    config = model.config.get_text_config()
    if getattr(config, "rms_norm_eps", None) is not None:
        config.rms_norm_eps = _shortest_float32(config.rms_norm_eps)
    if hasattr(model.config, "_model_name_or_path"):  # general.name under a key that nothing reads
        del model.config._model_name_or_path
    _check_windows(path, header, config)
    _mend_tokenizer(tokenizer, header, config)
    return model, tokenizer


def _check_windows(path: Path, header: GgufHeader, config: Any) -> None:
    """Refuse a file whose period of sliding layers transformers does not take over: it counts by the family's own."""
    arch = header.metadata.get("general.architecture")
    period = header.metadata.get(f"{arch}.attention.sliding_window_pattern")
    kinds = getattr(config, "layer_types", None)
    if not isinstance(period, int) or kinds is None:
        return
    stated = [period == 0 or index % period < period - 1 for index in range(len(kinds))]
    if stated != [kind == "sliding_attention" for kind in kinds]:
        raise SourceError(
            f"{path} has sliding layers in a period of {period}, which transformers does not read from GGUF; "
            "start from the model's Hugging Face folder"
        )


def _dequantise() -> dict[str, Any]:
    # newer transformers keep the blocks packed where a kernel can use them; we edit and train weights, so unpack
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _stored_dtype(header: GgufHeader) -> "torch.dtype":
    import torch

    matrices = {kind for name, kind in header.tensor_types.items() if "norm" not in name and name.endswith(".weight")}
    return {frozenset({0}): torch.float32, frozenset({1}): torch.float16, frozenset({0, 1}): torch.float16}.get(
        frozenset(matrices), torch.bfloat16
    )


def forget_loading(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Drop the traces of how a tokenizer was loaded, which transformers would save as if they were settings."""
    for key in ("is_local", "local_files_only", "trust_remote_code", "gguf_file", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)


def _forget_quantisation(model: "PreTrainedModel") -> None:
    """Make the model an ordinary one: a saved quantization_config would have its loader look for GGUF blocks."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for name, value in (("hf_quantizer", None), ("quantization_method", None), ("is_quantized", False)):
        if hasattr(model, name):
            setattr(model, name, value)


def _shortest_float32(value: float) -> float:
    """Return the shortest decimal that is the same float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _mend_tokenizer(tokenizer: "PreTrainedTokenizerBase", header: GgufHeader, config: Any) -> None:
    """Give the tokenizer what the file states and transformers' conversion leaves out."""
    forget_loading(tokenizer)
    if isinstance(getattr(config, "max_position_embeddings", None), int):
        tokenizer.model_max_length = config.max_position_embeddings
    if header.metadata.get("tokenizer.ggml.pre") == "smollm":
        # SmolLM's merges were learned on text cut at each digit; without this "  12" becomes other tokens
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
