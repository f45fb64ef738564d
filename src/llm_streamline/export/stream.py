"""Surgery on files: layers removed from a checkpoint without loading the model.

The edit is first made on a model without weights (meta device), by the same code that edits a model in memory, so that
all its refusals hold; then each tensor that stays is read from the source's files and written under its new name.
Memory: the model's skeleton and one tensor.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.arch import find_arch
from llm_streamline.checkpoint import serve_older_readers, tidy_config
from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.export.shards import num_bytes, parse_size, shard_order, split_shards, write_shards
from llm_streamline.output import check_room, open_output, publish, saving, temporary_folder
from llm_streamline.quiet import quiet_transformers
from llm_streamline.replacements.ship import shipped_files
from llm_streamline.runtime import pick_dtype
from llm_streamline.sources import ModelSource, load_skeleton, load_tokenizer, model_folder, stated_dtype
from llm_streamline.sources.weights import TensorHeader, Weights, read_header, read_weights
from llm_streamline.surgery import apply_plan

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from llm_streamline.plan import Plan

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def stream_plan(
    source: ModelSource,
    plan: "Plan",
    out: str | Path,
    *,
    extra_files: Mapping[str, str] | None = None,
    max_shard_size: str = "5GB",
    with_tokenizer: bool = True,
    dtype: "torch.dtype | None" = None,
) -> Path:
    """Write the checkpoint of the model that is left when a plan's layers are removed.

    The result is what loading the model, `apply_plan` and `save_checkpoint` give, to the bit.

    Args:
        source: from `resolve_model`; a GGUF file is first converted into a cached folder, which loads it once.
        plan: with edits of kind remove only.
        out: an output folder of ours; created if missing.
        extra_files: name -> text, put beside the weights.
        max_shard_size: weights above this are split.
        with_tokenizer: False for a model that has none.
        dtype: of the weights written; None keeps the checkpoint's own.

    Returns:
        The folder.

    Raises:
        PlanError: the plan replaces layers, which takes a training, or is for another model.
        SourceError: a tensor has another shape than the config says.
        ArchitectureError: the edit is not sound, or the files' names do not tell where the layers are.
        OutputError: the folder is not ours, or cannot be written; nothing is left under a real name.
    """
    check_streamable(plan)
    folder = model_folder(source)
    weights = read_weights(folder)
    skeleton = load_skeleton(source)
    arch = find_arch(skeleton)
    first = skeleton.get_submodule(arch.layers)[0]
    prefix = _layer_prefix(weights, arch.layers, first, arch.num_layers, source.spec)
    sources = apply_plan(skeleton, plan)
    dtype = dtype or pick_dtype("auto", stated_dtype(skeleton.config, weights))
    files = {**shipped_files(skeleton), **(extra_files or {})}
    tidy_config(skeleton, dtype, files)
    renamed = _renamed(weights, prefix, sources, skeleton)
    headers = {new: _header(skeleton, new, weights.tensors[old], dtype) for new, old in renamed.items()}
    out = open_output(out, source=source.path)
    check_room(out, sum(num_bytes(header) for header in headers.values()))
    tokenizer = load_tokenizer(source) if with_tokenizer else None
    with saving(out), temporary_folder(out) as staging:
        with quiet_transformers():
            skeleton.config.save_pretrained(staging)
            if skeleton.can_generate():
                skeleton.generation_config.save_pretrained(staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        shards = split_shards(headers.items(), parse_size(max_shard_size))
        write_shards(staging, shards, headers, _reader(weights, renamed, headers))
        serve_older_readers(staging)
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
        publish(staging, out, last="config.json")
    return out


def check_streamable(plan: "Plan") -> None:
    """Raise PlanError unless the plan only removes layers."""
    replaced = [edit for edit in plan.edits if edit.kind != "remove"]
    if replaced:
        raise PlanError(
            f"the plan makes new weights for [{replaced[0].start}, {replaced[0].stop}), which must be trained or made: "
            "use `train` or `apply`; only removing layers works without loading it"
        )


def _layer_prefix(weights: Weights, path: str, layer: "nn.Module", num_layers: int, spec: str) -> str:
    """What stands before a layer's number in the files' names, e.g. `model.layers.`; older files name it otherwise.

    Of the numbered runs that are long enough (a vision tower may be, too) it is the one whose tensors are the layer's.
    """
    runs: dict[str, dict[int, set[str]]] = {}
    for name in weights.tensors:
        for match in re.finditer(r"(?<=\.)(\d+)\.", name):
            run = runs.setdefault(name[: match.start()], {})
            run.setdefault(int(match[1]), set()).add(name[match.end() :])
    ours = set(layer.state_dict())
    alike = {
        prefix: sum(len(ours & run[index]) for index in range(num_layers))
        for prefix, run in runs.items()
        if run.keys() >= set(range(num_layers))
    }
    found = [prefix for prefix, count in alike.items() if count == max(alike.values()) > 0]
    if len(found) != 1:
        raise ArchitectureError(
            f"the files of {spec} do not tell where the {num_layers} layers of {path} are; apply the plan in memory "
            "instead"
        )
    return found[0]


def _renamed(weights: Weights, prefix: str, sources: list[int], skeleton: "PreTrainedModel") -> dict[str, str]:
    """New name -> old name of every tensor that stays."""
    places = {old: new for new, old in enumerate(sources)}
    dropped = _dropped(skeleton, weights)
    renamed = {}
    for old in weights.tensors:
        match = re.match(rf"{re.escape(prefix)}(\d+)\.", old)
        if old in dropped or old.endswith("rotary_emb.inv_freq"):
            continue
        if match is None:
            renamed[old] = old
        elif int(match[1]) in places:  # layers beyond the last one predict further tokens; they do not fit a cut model
            renamed[f"{prefix}{places[int(match[1])]}.{old[match.end() :]}"] = old
    return {name: renamed[name] for name in sorted(renamed, key=shard_order)}


def _dropped(skeleton: "PreTrainedModel", weights: Weights) -> set[str]:
    """Second copies of tied weights, which some files hold."""
    if not skeleton.config.get_text_config(decoder=True).tie_word_embeddings:
        return set()
    tied = getattr(skeleton, "_tied_weights_keys", None) or {}
    pairs = tied.items() if isinstance(tied, dict) else ()
    return {copy for copy, original in pairs if copy in weights.tensors and original in weights.tensors}


def _header(skeleton: "PreTrainedModel", name: str, header: TensorHeader, dtype: "torch.dtype") -> TensorHeader:
    """How a tensor is written: in the model's dtype, except what is no floating-point number or stays in float32."""
    if header.dtype not in _DTYPES:
        return header
    patterns = [*(getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ())]
    if str(dtype) == "torch.float16":
        patterns += [*(getattr(skeleton, "_keep_in_fp32_modules", None) or ())]
    kept = any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns)
    names = {f"torch.{theirs}": ours for ours, theirs in _DTYPES.items()}
    return TensorHeader("F32" if kept else names[str(dtype)], header.shape)


def _reader(weights: Weights, renamed: dict[str, str], headers: dict[str, TensorHeader]):
    import torch
    from safetensors import safe_open

    files = {name: path for path in weights.files for name in read_header(path)}

    def read(name: str) -> torch.Tensor:
        with safe_open(files[renamed[name]], framework="pt") as file:
            tensor = file.get_tensor(renamed[name])
        return tensor.to(getattr(torch, _DTYPES[headers[name].dtype])) if headers[name].dtype in _DTYPES else tensor

    return read
