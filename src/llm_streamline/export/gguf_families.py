"""What llama.cpp must be told about each family, and how its tensors differ from transformers' ones.

A row a family: llama.cpp's name of the architecture, the metadata beyond the common keys, and the changes to tensors.
What llama.cpp cannot say is refused with the reason; what it says a little differently becomes a warning.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import ArchitectureError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Metadata = dict[str, Any]  # key without the architecture's prefix -> int, float, str, bool
Change = Callable[[str, "torch.Tensor", "PretrainedConfig"], "torch.Tensor"]
# Layers between two with full attention, counting the latter, where llama.cpp's file says nothing.
SWA_PERIODS = {"gemma2": 2, "gemma3": 6}
# llama.cpp takes a model of that many layers for the one of 27 billion parameters and scales its queries differently.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_NOPE_STEP = 4  # SmolLM3: a constant in llama.cpp's source


@dataclass(frozen=True)
class GgufFamily:
    """One row: how a transformers family is told to llama.cpp."""

    arch: str
    metadata: tuple[Callable[["PretrainedConfig"], Metadata], ...] = ()
    changes: tuple[Change, ...] = ()


def check_exportable(model_type: str) -> GgufFamily:
    """Return the row of a family.

    Raises:
        ArchitectureError: there is none.
    """
    if model_type in GGUF_FAMILIES:
        return GGUF_FAMILIES[model_type]
    raise ArchitectureError(
        f"no GGUF export for {model_type} models here (there is for {', '.join(sorted(GGUF_FAMILIES))}); the folder is "
        "a plain Hugging Face one, so llama.cpp's own script may do it: python convert_hf_to_gguf.py FOLDER"
    )


def common_metadata(config: "PretrainedConfig") -> Metadata:
    """Sizes that every family has."""
    num_heads = config.num_attention_heads
    values: Metadata = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": num_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or num_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    head_dim = head_size(config)
    part = rope_parameters(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    values["rope.dimension_count"] = int(head_dim * (part or 1.0))
    if head_dim * num_heads != config.hidden_size:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return values


def head_size(config: "PretrainedConfig") -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# --- rotary positions


def rope_parameters(config: "PretrainedConfig") -> dict[str, Any]:
    """The rotary settings of layers with full attention; one dictionary for all layers in most families."""
    settings = getattr(config, "rope_parameters", None) or {}
    return settings.get("full_attention", settings)


def _rope(config: "PretrainedConfig") -> Metadata:
    settings = rope_parameters(config)
    kind = settings.get("rope_type", "default")
    values: Metadata = {"rope.freq_base": float(settings["rope_theta"])}
    if kind in ("default", "llama3"):  # llama3's factors are a tensor of their own
        return values
    if kind == "linear":
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    if kind == "yarn":
        odd = [k for k in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow") if settings.get(k)]
        if odd:
            raise ArchitectureError(f"rotary scaling yarn with {odd[0]} is not exported to GGUF here")
        return values | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(settings["factor"]),
            "rope.scaling.original_context_length": int(_original_context(config, settings)),
        }
    if kind == "longrope":
        original = _original_context(config, settings)
        scale = config.max_position_embeddings / original
        stretch = settings.get("attention_factor") or (
            1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
        )
        return values | {
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.attn_factor": float(stretch),
        }
    raise ArchitectureError(f"rotary scaling of type {kind!r} is not exported to GGUF here")


def _original_context(config: "PretrainedConfig", settings: dict[str, Any]) -> int:
    return (
        settings.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def rope_tensors(config: "PretrainedConfig") -> dict[str, "torch.Tensor"]:
    """Divisors of the rotary frequencies that llama.cpp reads as tensors: (rotary channels / 2,) float32."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = rope_parameters(config)
    kind = settings.get("rope_type", "default")
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
        return {"rope_freqs.weight": settings["rope_theta"] ** -exponents / scaled}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(settings[f"{name}_factor"], dtype=torch.float32)
            for name in ("long", "short")
        }
    return {}


# --- attention windows


def sliding_layers(config: "PretrainedConfig") -> list[bool]:
    """For each layer whether its attention is limited to a window."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind != "full_attention" for kind in kinds]


def find_period(sliding: list[bool], default: int) -> int | None:
    """The period p for which layer i slides exactly when i % p < p - 1; None when there is none."""
    for period in (default, *range(2, len(sliding) + 1)):
        if sliding == counted_pattern(period, len(sliding)):
            return period
    return None


def counted_pattern(period: int, num_layers: int) -> list[bool]:
    """For each layer whether it slides, as llama.cpp counts; with period 0 all do."""
    return [period == 0 or i % period < period - 1 for i in range(num_layers)]


def window_period(arch: str, sliding: list[bool], default: int) -> int:
    """The period of the layers with full attention, as llama.cpp wants it.

    Raises:
        ArchitectureError: there is none, or all layers are of one kind, which makes llama.cpp abort.
    """
    listed = f"sliding layers: {[i for i, slides in enumerate(sliding) if slides]} of {len(sliding)}"
    other = "or serve the Hugging Face folder with transformers or vLLM"
    if len(set(sliding)) == 1:
        raise ArchitectureError(
            f"llama.cpp runs {arch} models only with both sliding and full attention ({listed}): keep at least one "
            f"layer of each kind, {other}"
        )
    period = find_period(sliding, default)
    if period is None:
        raise ArchitectureError(
            f"the attention windows of this {arch} model would follow no period ({listed}), and llama.cpp computes "
            "them by counting: it would give wrong output. Remove layers so that every p-th has full attention, e.g. "
            f"whole groups of {default}, {other}"
        )
    return period


def _counted_windows(arch: str) -> Callable[["PretrainedConfig"], Metadata]:
    def metadata(config: "PretrainedConfig") -> Metadata:
        default = SWA_PERIODS[arch]
        period = window_period(arch, sliding_layers(config), default)
        values: Metadata = {"attention.sliding_window": config.sliding_window}
        # a list under this key is ignored by llama.cpp for this family; a single number is the period
        return values if period == default else values | {"attention.sliding_window_pattern": period}

    return metadata


def runtime_warnings(config: "PretrainedConfig", arch: str) -> list[str]:
    """Where llama.cpp does not quite do what transformers does, in sentences."""
    warnings = []
    window = getattr(config, "sliding_window", None)
    limited = any(sliding_layers(config)) if getattr(config, "layer_types", None) else bool(window)
    if arch not in SWA_PERIODS and window and limited and getattr(config, "use_sliding_window", True):
        warnings.append(
            f"llama.cpp ignores the attention window of {config.model_type} models: its output differs from "
            f"transformers' for texts longer than {window} tokens"
        )
    if rope_parameters(config).get("rope_type") == "longrope":
        original = _original_context(config, rope_parameters(config))
        warnings.append(
            f"llama.cpp takes the long rotary factors whenever it is started with a context above {original} tokens, "
            f"transformers only for texts that long: start it with --ctx-size {original} for short texts"
        )
    return warnings


def _no_rope_layers(config: "PretrainedConfig") -> Metadata:
    rotary = list(config.no_rope_layers)
    if rotary != [int((i + 1) % _NOPE_STEP != 0) for i in range(len(rotary))]:
        raise ArchitectureError(
            f"llama.cpp takes every {_NOPE_STEP}th layer of a SmolLM3 for one without rotary positions, which is no "
            f"longer so (no_rope_layers: {rotary}): it would give wrong output. Remove whole groups of {_NOPE_STEP} "
            "layers, or serve the folder with transformers or vLLM"
        )
    return {}


# --- other settings


def _softcaps(config: "PretrainedConfig") -> Metadata:
    names = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    return {key: float(getattr(config, name)) for key, name in names.items() if getattr(config, name, None)}


def _gemma_sizes(config: "PretrainedConfig") -> Metadata:
    return {"attention.key_length": head_size(config), "attention.value_length": head_size(config)}


def _gemma3_local_rope(config: "PretrainedConfig") -> Metadata:
    local = config.rope_parameters.get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        raise ArchitectureError("scaled rotary positions in sliding layers are not exported to GGUF here")
    if getattr(config, "use_bidirectional_attention", False):
        raise ArchitectureError("a Gemma 3 with attention in both directions is no language model llama.cpp runs")
    theta = float(local.get("rope_theta", 10_000.0))
    return {} if theta == 10_000.0 else {"rope.freq_base_swa": theta}


def _granite_scales(config: "PretrainedConfig") -> Metadata:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


# --- tensors


def _interleave_rotary(name: str, tensor: "torch.Tensor", config: "PretrainedConfig") -> "torch.Tensor":
    """Put the two halves of each rotary pair side by side in the rows of q and k, as llama.cpp's Llama wants them."""
    match = re.search(r"\.(q|k)_proj\.(weight|bias)$", name)
    if not match:
        return tensor
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _gemma_norm(name: str, tensor: "torch.Tensor", config: "PretrainedConfig") -> "torch.Tensor":
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor  # Gemma multiplies by 1 + w, llama.cpp by w


def _query_scale(arch: str) -> Change:
    """Put into the queries what differs between the model's scale and the one that llama.cpp derives from sizes."""

    def change(name: str, tensor: "torch.Tensor", config: "PretrainedConfig") -> "torch.Tensor":
        place = "self_attn.q_norm.weight" if arch == "gemma3" else "self_attn.q_proj.weight"
        if not name.endswith(place):
            return tensor
        is_27b = config.num_hidden_layers == LAYERS_OF_27B[arch]
        divisor = config.hidden_size // config.num_attention_heads if is_27b else head_size(config)
        ratio = math.sqrt(divisor / config.query_pre_attn_scalar)
        return tensor if ratio == 1 else tensor.float() * ratio

    return change


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", (_rope,), (_interleave_rotary,)),
    "mistral": GgufFamily("llama", (_rope,), (_interleave_rotary,)),
    "smollm3": GgufFamily("smollm3", (_rope, _no_rope_layers), (_interleave_rotary,)),
    "granite": GgufFamily("granite", (_rope, _granite_scales), (_interleave_rotary,)),
    "qwen2": GgufFamily("qwen2", (_rope,)),
    "qwen3": GgufFamily("qwen3", (_rope,)),
    "olmo2": GgufFamily("olmo2", (_rope,)),
    "phi3": GgufFamily("phi3", (_rope,)),
    "gemma": GgufFamily("gemma", (_gemma_sizes, _rope), (_gemma_norm,)),
    "gemma2": GgufFamily(
        "gemma2", (_gemma_sizes, _rope, _softcaps, _counted_windows("gemma2")), (_gemma_norm, _query_scale("gemma2"))
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        (_gemma_sizes, _rope, _softcaps, _counted_windows("gemma3"), _gemma3_local_rope),
        (_gemma_norm, _query_scale("gemma3")),
    ),
}
