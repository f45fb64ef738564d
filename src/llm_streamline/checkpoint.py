"""Save a model as a plain Hugging Face folder, whole or not at all; `prove_checkpoint` then shows that it is sound.

What is written: weights (safetensors, in shards when large), config, generation_config, tokenizer with chat template,
and whatever extra files the caller names. The folder says nothing about how its source was stored or where it lay.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import OutputError
from llm_streamline.export.bounded import save_model
from llm_streamline.logs import get_logger
from llm_streamline.offload import is_streamed
from llm_streamline.output import TOOL_FOLDER, check_room, open_output, publish, saving, temporary_folder
from llm_streamline.proof import Check, Proof, probe_texts, prove_checkpoint
from llm_streamline.quiet import quiet_transformers
from llm_streamline.sources import LoadedModel

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Check", "Proof", "probe_texts", "prove_checkpoint", "save_checkpoint"]

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAM_KEYS = ("early_stopping", "length_penalty")


def save_checkpoint(
    model: "PreTrainedModel | LoadedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    out: str | Path,
    *,
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model and its tokenizer into an output folder; all files appear together.

    In memory, too, the model's config is brought in order: dtype and architectures as they are, no quantization_config.
    Parameters of another dtype than most (a replacement trained in float32) are cast to it, so that memory and file
    agree.

    Args:
        model: the model, or what `load_model` returned.
        tokenizer: saved with its chat template; None saves none.
        out: an output folder of ours; created if missing.
        extra_files: name -> contents, put beside the weights (README.md, modelling code).
        max_shard_size: weights above this are split, e.g. "5GB".

    Returns:
        The folder.

    Raises:
        OutputError: the folder is not ours, the disk is full, an extra file has an impossible name. Nothing is left
            under a real name, and what was there before stays.
    """
    model = _bare(model.model if isinstance(model, LoadedModel) else model)
    extra_files = extra_files or {}
    for name in extra_files:
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or parts[0] == TOOL_FOLDER:
            raise OutputError(f"{name!r} is no name for a file beside the weights")
    out = open_output(out)
    dtype = _unify_dtype(model)
    tidy_config(model, dtype, extra_files)
    check_room(out, sum(p.numel() * p.element_size() for p in model.parameters()))
    with saving(out), temporary_folder(out) as staging:
        with quiet_transformers():
            # transformers renames some families' weights on saving, and back on loading, but never for shipped code
            renamed = not _names_shipped_code(model.config, extra_files)
            if is_streamed(model):
                save_model(model, staging, max_shard_size=max_shard_size, original_format=renamed)
            else:
                model.save_pretrained(staging, max_shard_size=max_shard_size, save_original_format=renamed)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        serve_older_readers(staging)
        for name, content in extra_files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        publish(staging, out, last="config.json")
    return out


def _bare(model: Any) -> "PreTrainedModel":
    """The model inside the wrappers of torch.compile and of data-parallel training."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _unify_dtype(model: "PreTrainedModel") -> "torch.dtype":
    """Cast stray parameters to the dtype that most numbers have, except those the family keeps in float32."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    dtype = sizes.most_common(1)[0][0]
    patterns = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    patterns += [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    for name, parameter in model.named_parameters():
        kept = any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns)
        if parameter.is_floating_point() and parameter.dtype != dtype and not kept:
            parameter.data = parameter.data.to(dtype)
    return dtype


def tidy_config(model: "PreTrainedModel", dtype: "torch.dtype", extra_files: Mapping[str, str | bytes]) -> None:
    config = model.config
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
        part.dtype = dtype
        if getattr(part, "use_cache", None) is False:
            part.use_cache = True  # left over from training; it changes speed only
    shipped = _names_shipped_code(config, extra_files)
    if type(model).__module__.startswith("llm_streamline.") and not shipped:  # no MLP of ours is left: a stock model
        model.__class__ = next(base for base in type(model).__mro__ if base.__module__.startswith("transformers."))
    config.architectures = [type(model).__name__]
    if shipped:
        config.architectures = [config.auto_map["AutoModelForCausalLM"].rpartition(".")[2]]  # stock code would not do
    elif type(model).__module__.startswith("transformers."):
        config.auto_map = None  # a stock class needs no code of its own
        del config.auto_map
    for name, value in (("hf_quantizer", None), ("quantization_method", None), ("is_quantized", False)):
        if hasattr(model, name):
            setattr(model, name, value)
    if getattr(model, "generation_config", None) is not None:
        _tidy_generation(model.generation_config)


def _names_shipped_code(config: Any, extra_files: Mapping[str, str | bytes]) -> bool:
    """Whether the config points at modelling code that is saved beside the weights."""
    module = ((getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM") or "").rpartition(".")[0]
    return f"{module}.py" in extra_files


def _tidy_generation(generation: "GenerationConfig") -> None:
    """Unset what has no effect, because transformers refuses to save it: temperature without sampling, and its like."""
    if generation.use_cache is False:
        generation.use_cache = True
    unset = []
    if generation.do_sample is not True:
        unset += [key for key in _SAMPLING_KEYS if getattr(generation, key, None) is not None]
    if generation.num_beams in (None, 1):
        unset += [key for key in _BEAM_KEYS if getattr(generation, key, None) is not None]
    for key in unset:
        setattr(generation, key, None)
    if unset:
        get_logger(__name__).debug("generation_config: unset %s, which had no effect", ", ".join(unset))


def serve_older_readers(folder: Path) -> None:
    """Add the older spellings of what transformers 5 spells anew, where the old one can say the same.

    transformers 4 takes theta 10,000 in silence when `rope_theta` is missing, and knows no class TokenizersBackend.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        _add_rope_theta(part)
        part.pop("_name_or_path", None)  # a path on this machine
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings.pop("backend", None)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_rope_theta(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return  # none, or one per kind of layer: the families that have it are younger than the new spelling
    config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
