"""GGUF in, GGUF out: layers removed without leaving the format, quantised blocks copied bit for bit.

Tensors of removed layers are left out, the others renumbered; the layer count and every list with one entry a layer are
cut with them. llama.cpp computes some kinds of layers by counting, and some settings from the number of layers: a cut
that would make it count wrong is refused.
"""

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.export.gguf import GgufExport
from llm_streamline.export.gguf_families import LAYERS_OF_27B, counted_pattern, window_period
from llm_streamline.export.gguf_raw import UINT32, Entry, RawGguf, write_raw
from llm_streamline.export.whole_file import new_file
from llm_streamline.files import check_room
from llm_streamline.sources.gguf import read_gguf_header

if TYPE_CHECKING:
    from llm_streamline.plan import Plan

# Period of the layers with full attention, where llama.cpp takes another one from the file: a single number under
# attention.sliding_window_pattern. A list under that key it ignores for these families.
_SETTABLE_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "olmo2": 4}
# Period of some kind of layer that is a constant in llama.cpp's source.
_FIXED_PERIODS = {
    "smollm3": 4,
    "llama4": 4,
    "smallthinker": 4,
    "laguna": 4,
    "cohere2moe": 4,
    "afmoe": 4,
    "exaone-moe": 4,
    "mellum": 4,
    "plamo3": 8,
}
_PERIOD_KEYS = ("interleave_moe_layer_step", "full_attention_interval", "moe_every_n_layers")
_LITE_DEPTHS = (
    26,
    27,
)  # llama.cpp takes a DeepSeek-V2 of that depth for the Lite one, which projects queries otherwise
_NOT_PER_LAYER = ("rope.dimension_sections", "rope.scaling.short_factor", "rope.scaling.long_factor")


def cut_gguf(source: str | Path, out_file: str | Path, plan: "Plan", *, overwrite: bool = False) -> GgufExport:
    """Write a GGUF file again without the layers that a plan removes.

    Args:
        source: the GGUF file to read.
        out_file: the file to make.
        plan: with edits of kind remove only.
        overwrite: replace a file that is there.

    Returns:
        Path and size; dtype is `unchanged`.

    Raises:
        SourceError: the file is no sound GGUF file of a language model.
        PlanError: the plan replaces layers, or was made for another model.
        ArchitectureError: llama.cpp could not run the result rightly; the message says why.
        OutputError: the file exists, or cannot be written.
    """
    source = Path(source)
    replaced = [edit for edit in plan.edits if edit.kind != "remove"]
    if replaced:
        raise PlanError(
            f"the plan makes new weights for [{replaced[0].start}, {replaced[0].stop}), and a GGUF file can only "
            "lose layers here: train it with `compress` on the same file, then `export --gguf` the result"
        )
    read_gguf_header(source)
    from gguf.constants import GGML_QUANT_SIZES

    sources = plan.layer_sources()
    with RawGguf(source, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}) as raw:
        _check_plan(raw, plan)
        entries = cut_entries(raw, sources)
        tensors = []
        places = {old: new for new, old in enumerate(sources)}
        for tensor in raw.tensors:
            match = re.match(r"blk\.(\d+)\.", tensor.name)
            if match is None:
                tensors.append((tensor.name, tensor))
            elif int(match[1]) in places:
                tensors.append((f"blk.{places[int(match[1])]}.{tensor.name[match.end() :]}", tensor))
        with new_file(out_file, overwrite=overwrite) as temporary:
            check_room(temporary.parent, sum(tensor.num_bytes for _, tensor in tensors))
            write_raw(temporary, raw, entries, tensors)
            read_gguf_header(temporary)
    path = Path(out_file).expanduser()
    return GgufExport(path, "unchanged", path.stat().st_size, ())


def _check_plan(raw: RawGguf, plan: "Plan") -> None:
    arch = raw.get("general.architecture")
    for key, ours in (("block_count", plan.model.num_layers), ("embedding_length", plan.model.hidden_size)):
        theirs = raw.get(f"{arch}.{key}")
        if theirs != ours:
            raise PlanError(
                f"the plan was made for '{plan.model.spec}' ({key} {ours}), but {raw.path} has {key} {theirs}; make a "
                "plan for this file with `llm-streamline plan`"
            )


def cut_entries(raw: RawGguf, sources: Sequence[int]) -> list[Entry]:
    """The metadata of the file whose layer i is layer `sources[i]` of `raw`.

    Raises:
        ArchitectureError: the result cannot be told to llama.cpp.
    """
    arch = raw.get("general.architecture")
    num_layers = raw.get(f"{arch}.block_count")
    if list(sources) == list(range(num_layers)):
        return raw.entries
    for check in _CHECKS:
        check(raw, arch, sources)
    prefix, entries = f"{arch}.", []
    for entry in raw.entries:
        key = entry.key.removeprefix(prefix)
        if not entry.key.startswith(prefix):
            entries.append(entry)
        elif key == "block_count":
            entries.append(entry.with_value(len(sources)))
        elif key == "leading_dense_block_count":
            entries.append(entry.with_value(_leading_dense(entry.value, sources)))
        elif entry.length == num_layers and key not in _NOT_PER_LAYER:
            entries.append(entry.picked(sources))
        else:
            entries.append(entry)
    return _with_period(raw, arch, sources, entries)


def _leading_dense(count: int, sources: Sequence[int]) -> int:
    dense = [source < count for source in sources]
    if dense != sorted(dense, reverse=True):
        raise ArchitectureError(f"the first {count} layers are dense, and dense layers must stay first")
    return sum(dense)


def _with_period(raw: RawGguf, arch: str, sources: Sequence[int], entries: list[Entry]) -> list[Entry]:
    """State the period of the windows, where the cut changes it and the file can state it."""
    if arch not in _SETTABLE_PERIODS or not raw.get(f"{arch}.attention.sliding_window"):
        return entries
    key = f"{arch}.attention.sliding_window_pattern"
    stated = raw.get(key)  # a list counts as nothing stated, as in llama.cpp
    default = _SETTABLE_PERIODS[arch]
    before = counted_pattern(stated if isinstance(stated, int) else default, raw.get(f"{arch}.block_count"))
    after = [before[source] for source in sources]
    period = window_period(arch, after, default)
    entries = [entry for entry in entries if entry.key != key]
    if period != default:
        entries.append(Entry(key, UINT32, struct.pack("<I", period)))
    return entries


# --- what is refused


def _check_fixed_periods(raw: RawGguf, arch: str, sources: Sequence[int]) -> None:
    periods = {f"of {arch} models, a constant in llama.cpp's source": _FIXED_PERIODS.get(arch)}
    periods |= {f"stated by {key}": raw.get(f"{arch}.{key}") for key in _PERIOD_KEYS}
    for name, period in periods.items():
        if period and period > 1 and any(source % period != place % period for place, source in enumerate(sources)):
            raise ArchitectureError(
                f"llama.cpp picks the kind of a layer by counting (period {period}, {name}); after this cut it would "
                f"count wrong. Remove whole groups of {period} layers"
            )


def _check_shared_parts(raw: RawGguf, arch: str, sources: Sequence[int]) -> None:
    if any(tensor.name.startswith("per_layer_") for tensor in raw.tensors):
        raise ArchitectureError(f"{arch} keeps something for all layers in one tensor, which is not cut here")
    for key, what in (
        ("attention.shared_kv_layers", "layers that use the keys and values of others"),
        ("nextn_predict_layers", "layers that predict further tokens"),
    ):
        if raw.get(f"{arch}.{key}"):
            raise ArchitectureError(
                f"this {arch} file has {what} ({key}), which are counted from the end; not cut here"
            )


def _check_depth(raw: RawGguf, arch: str, sources: Sequence[int]) -> None:
    depths = (raw.get(f"{arch}.block_count"), len(sources))
    if arch == "baichuan":
        raise ArchitectureError("llama.cpp tells Baichuan 7B from 13B, which place tokens otherwise, by their depth")
    if arch == "deepseek2" and (depths[0] in _LITE_DEPTHS) != (depths[1] in _LITE_DEPTHS):
        raise ArchitectureError(
            f"llama.cpp tells DeepSeek-V2 Lite from the full one by its depth; {depths[1]} layers would be the other"
        )
    if LAYERS_OF_27B.get(arch) in depths:
        wide = raw.get(f"{arch}.embedding_length") // raw.get(f"{arch}.attention.head_count")
        if wide != raw.get(f"{arch}.attention.key_length"):
            raise ArchitectureError(
                f"llama.cpp scales the queries of a {arch} model of {LAYERS_OF_27B[arch]} layers differently, and a "
                "quantised file cannot make up for it; cut the Hugging Face folder and export that"
            )


_CHECKS: tuple[Callable[[RawGguf, str, Sequence[int]], None], ...] = (
    _check_fixed_periods,
    _check_shared_parts,
    _check_depth,
)
