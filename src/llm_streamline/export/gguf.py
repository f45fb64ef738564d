"""A Hugging Face folder as one GGUF file, for llama.cpp and what is built on it.

Tensors are read, changed and written one at a time. Which families, and how: `gguf_families.py`; the tokenizer:
`gguf_tokenizer.py`. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import ArchitectureError, ConfigError, MissingExtraError, NumericsError, SourceError
from llm_streamline.export.gguf_families import (
    GgufFamily,
    check_exportable,
    common_metadata,
    rope_tensors,
    runtime_warnings,
)
from llm_streamline.export.gguf_quantise import MIXED_TYPES, quantise_file
from llm_streamline.export.gguf_tokenizer import tokenizer_metadata
from llm_streamline.export.whole_file import new_file
from llm_streamline.files import check_room
from llm_streamline.quiet import quiet_transformers
from llm_streamline.sources.checks import read_config
from llm_streamline.sources.weights import Weights, read_header, read_json, read_weights

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PretrainedConfig

# What the gguf package can write -> the number llama.cpp gives such a file (general.file_type).
PLAIN_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9}
_SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


@dataclass(frozen=True)
class GgufExport:
    """What was written."""

    path: Path
    dtype: str
    num_bytes: int
    warnings: tuple[str, ...]  # where llama.cpp will not do quite what transformers does


def export_gguf(
    folder: str | Path,
    out_file: str | Path,
    dtype: str = "F16",
    *,
    name: str | None = None,
    pre: str | None = None,
    overwrite: bool = False,
) -> GgufExport:
    """Write a GGUF file with the model and the tokenizer of a Hugging Face folder.

    Args:
        folder: what `save_checkpoint` wrote, or any such folder with safetensors and tokenizer.json.
        out_file: the file to make.
        dtype: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1; with a llama.cpp binding installed Q4_K_M and its like.
        name: the model's name in the file; the folder's by default.
        pre: llama.cpp's name of the pre-tokenizer, where we cannot tell.
        overwrite: replace a file that is there.

    Returns:
        Path, size and warnings.

    Raises:
        ConfigError: unknown dtype.
        ArchitectureError: this family, or this model's settings, cannot be told to llama.cpp.
        SourceError: the folder is no model, or its tokenizer has no counterpart.
        NumericsError: a weight does not fit into float16.
        MissingExtraError: the package `gguf`, or for K-quants a llama.cpp binding, is not installed.
        OutputError: the file exists, or cannot be written.
    """
    gguf = _gguf_package()
    folder, dtype = Path(folder), dtype.upper()
    if dtype in MIXED_TYPES:
        return _export_mixed(folder, Path(out_file), dtype, name=name, pre=pre, overwrite=overwrite)
    if dtype not in PLAIN_TYPES:
        raise ConfigError(f"no GGUF type {dtype!r}; known: {', '.join((*PLAIN_TYPES, *MIXED_TYPES))}")
    weights, config, family = _open(folder)
    metadata = _metadata(config, family)
    with quiet_transformers():
        words = tokenizer_metadata(folder, config.vocab_size, pre=pre)
    kind = gguf.GGMLQuantizationType[dtype]
    tensors = _Tensors(folder, weights, config, family, kind)
    warnings = tuple(runtime_warnings(config, family.arch))
    with new_file(out_file, overwrite=overwrite) as temporary:
        check_room(temporary.parent, tensors.num_bytes)
        writer = gguf.GGUFWriter(temporary, family.arch)
        try:
            _write_metadata(writer, metadata, words, _general(folder, name, dtype, weights))
            for tensor in tensors.plan:
                writer.add_tensor_info(tensor.name, tensor.shape, _numpy_type(tensor), tensor.num_bytes, tensor.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in tensors.arrays():
                writer.write_tensor_data(array)
        finally:
            writer.close()
    path = Path(out_file).expanduser()
    return GgufExport(path, dtype, path.stat().st_size, warnings)


def _export_mixed(folder: Path, out_file: Path, dtype: str, *, overwrite: bool, **options: Any) -> GgufExport:
    """K-quants: a 16-bit file first, then llama.cpp's own quantiser."""
    with new_file(out_file, overwrite=overwrite) as temporary:
        plain = temporary.with_suffix(".plain.gguf")
        try:
            exported = export_gguf(folder, plain, "BF16" if _is_bfloat16(folder) else "F16", **options)
            quantise_file(plain, temporary, dtype)
        finally:
            plain.unlink(missing_ok=True)
    return GgufExport(out_file, dtype, out_file.stat().st_size, exported.warnings)


def _is_bfloat16(folder: Path) -> bool:
    return any(header.dtype in ("BF16", "F32") for header in read_weights(folder).tensors.values())


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            'writing GGUF files needs the package gguf: pip install "llm-streamline[gguf]"'
        ) from error
    return gguf


def _open(folder: Path) -> tuple[Weights, "PretrainedConfig", GgufFamily]:
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json; give the folder of a model")
    raw = read_json(folder / "config.json")
    if raw.get("auto_map"):
        raise ArchitectureError(
            f"{folder} brings modelling code of its own, which llama.cpp has no counterpart for; choose a replacement "
            "that is a stock layer (layer, swiglu) to export to GGUF"
        )
    family = check_exportable(str(raw.get("model_type")))
    if raw.get("quantization_config"):
        raise ArchitectureError(f"{folder} is quantised; export the unquantised model")
    return read_weights(folder), read_config(folder, str(folder)), family


# --- metadata


def _metadata(config: "PretrainedConfig", family: GgufFamily) -> dict[str, Any]:
    values = common_metadata(config)
    for part in family.metadata:
        values |= part(config)
    return {f"{family.arch}.{key}": value for key, value in values.items()}


def _general(folder: Path, name: str | None, dtype: str, weights: Weights) -> dict[str, Any]:
    count = weights.num_elements
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
    return {
        "general.type": "model",
        "general.name": name or folder.resolve().name,
        "general.size_label": size,
        "general.file_type": PLAIN_TYPES[dtype],
        "general.quantization_version": 2,
    }


def _write_metadata(writer: "GGUFWriter", *groups: dict[str, Any]) -> None:
    """Integers become uint32 (in lists int32), floats float32, as llama.cpp's own script writes them."""
    from gguf import GGUFValueType as Kind

    for key, value in ((key, value) for group in groups for key, value in group.items()):
        if isinstance(value, list):
            first = value[0] if value else ""
            inner = {bool: Kind.BOOL, int: Kind.INT32, float: Kind.FLOAT32, str: Kind.STRING}[type(first)]
            writer.add_key_value(key, value, Kind.ARRAY, inner)
        else:
            kind = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}[type(value)]
            writer.add_key_value(key, value, kind)


# --- tensors


@dataclass(frozen=True)
class _Planned:
    """One tensor of the file to be; `source` is its name in the folder, None for what is computed from the config."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: "GGMLQuantizationType"
    num_bytes: int


def _numpy_type(tensor: _Planned) -> Any:
    import numpy as np

    return {"F32": np.float32, "F16": np.float16}.get(tensor.kind.name, np.int8)  # int8: the shape counts elements


class _Tensors:
    """The tensors of a folder in llama.cpp's names and order, made one at a time."""

    def __init__(
        self,
        folder: Path,
        weights: Weights,
        config: "PretrainedConfig",
        family: GgufFamily,
        kind: "GGMLQuantizationType",
    ):
        self._config, self._family, self._wanted = config, family, kind
        self._computed = rope_tensors(config)
        self._files = {name: path for path in weights.files for name in read_header(path)}
        names = _new_names(weights, config, family)
        self.plan = [self._planned(name, None, tuple(tensor.shape)) for name, tensor in self._computed.items()]
        for old in sorted(names, key=_reading_order):
            self.plan.append(self._planned(names[old], old, weights.tensors[old].shape))
        self.num_bytes = sum(tensor.num_bytes for tensor in self.plan)

    def _planned(self, name: str, source: str | None, shape: tuple[int, ...]) -> _Planned:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = self._wanted
        if len(shape) < 2:
            kind = GGMLQuantizationType.F32  # norms, biases and factors are small, and kernels want them so
        elif kind.name in _SMALL_BLOCKS and name in ("token_embd.weight", "output.weight"):
            kind = GGMLQuantizationType.Q8_0  # costs little, and every token goes through them
        elements, num_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % elements:
            kind = GGMLQuantizationType.F16
            elements, num_bytes = GGML_QUANT_SIZES[kind]
        total = 1
        for length in shape:
            total *= length
        return _Planned(name, source, shape, kind, total // elements * num_bytes)

    def arrays(self) -> Iterator["np.ndarray"]:
        """Each tensor's numbers in the file's type, in the order of `plan`."""
        for planned in self.plan:
            tensor = self._computed[planned.name] if planned.source is None else self._read(planned.source)
            yield _encode(tensor, planned)

    def _read(self, name: str) -> "torch.Tensor":
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        for change in self._family.changes:
            tensor = change(name, tensor, self._config)
        return tensor


def _new_names(weights: Weights, config: "PretrainedConfig", family: GgufFamily) -> dict[str, str]:
    """The folder's tensor names -> llama.cpp's."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names = {}
    for old in weights.tensors:
        if old == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if old.endswith("rotary_emb.inv_freq"):
            continue
        new = table.get_name(old, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ArchitectureError(f"llama.cpp has no place for the tensor {old} in a {family.arch} model")
        names[old] = new
    wanted = {f"blk.{i}.attn_norm.weight" for i in range(config.num_hidden_layers)} - set(names.values())
    if wanted and family.arch not in ("olmo2",):
        raise SourceError(f"the weights lack {min(wanted)}; does config.json tell the right number of layers?")
    return names


def _reading_order(name: str) -> tuple[int, int, str]:
    layer = re.search(r"\.(\d+)\.", name)
    head = 0 if "embed" in name else 2
    return (1, int(layer[1]), name) if layer else (head, 0, name)


def _encode(tensor: "torch.Tensor", planned: _Planned) -> "np.ndarray":
    import numpy as np
    from gguf import GGMLQuantizationType, quantize

    values = np.ascontiguousarray(tensor.float().numpy())
    if planned.kind is GGMLQuantizationType.F16:
        limit = float(np.abs(values).max(initial=0))
        if not limit <= 65504:
            raise NumericsError(
                f"{planned.source} holds values up to {limit:.3g}, which float16 cannot; export as BF16 or F32"
            )
    return quantize(values, planned.kind)
