"""Warnings about runtimes that compute a layer's kind from its number instead of reading the config's list.

Transformers reads `layer_types` and its kin from the config, so any selection of layers loads there. Other runtimes
count: "every sixth layer has full attention". A cut that breaks the period gives wrong output there, without an error.
"""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from llm_streamline.layer_config import edited_config, text_config
from llm_streamline.plan import Plan, Selection

# Recent llama.cpp takes the window of each layer from the key attention.sliding_window_pattern when a file has it as a
# list, and counts otherwise; the step of layers without rotary positions is a constant in its source, in no key at all.
LLAMA_CPP = "llama.cpp and what is built on it"
OLD_TRANSFORMERS = "transformers before 4.53"
MLX = "MLX (mlx-lm)"  # counts by sliding_window_pattern, for Llama 4 by the constant 4; reads SmolLM3's list
VLLM = "vLLM"  # counts for gpt-oss only, as TensorRT-LLM does
TENSORRT_LLM = "TensorRT-LLM"
# Family -> (per-layer config key, runtimes that count instead of reading it).
COUNTED: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "gemma2": (("layer_types", (LLAMA_CPP, OLD_TRANSFORMERS)),),
    "gemma3_text": (("layer_types", (LLAMA_CPP, OLD_TRANSFORMERS, MLX)),),
    "cohere2": (("layer_types", (LLAMA_CPP, OLD_TRANSFORMERS, MLX)),),
    "gpt_oss": (("layer_types", (LLAMA_CPP, VLLM, TENSORRT_LLM)),),
    "exaone4": (("layer_types", (LLAMA_CPP, MLX)),),
    "smollm3": (("no_rope_layers", (LLAMA_CPP,)),),
    "llama4_text": (("no_rope_layers", (LLAMA_CPP, MLX)), ("moe_layers", (LLAMA_CPP, MLX))),
}
# Keys that state a pattern; without them a config class falls back to the family's own rule.
_EXPLICIT = ("layer_types", "no_rope_layers", "moe_layers", "mlp_only_layers", "mlp_layer_types")


def periodic_warnings(config: PreTrainedConfig) -> list[str]:
    """One sentence for each per-layer pattern of `config` that counting runtimes will get wrong.

    The pattern is compared with the one that the family's config class makes for this number of layers when it is
    not told otherwise.
    """
    text = text_config(config)
    counted = COUNTED.get(text.model_type, ())
    if not counted:
        return []
    told = text.to_dict()
    untold = type(text).from_dict({key: value for key, value in told.items() if key not in _EXPLICIT})
    warnings = []
    for key, runtimes in counted:
        ours, rule = getattr(text, key, None), getattr(untold, key, None)
        if ours is not None and rule is not None and list(ours) != list(rule):
            warnings.append(
                f"{key} of this {text.model_type} is no longer periodic (first difference at layer "
                f"{_first_difference(ours, rule)}): {', '.join(runtimes)} compute it by counting and will give "
                "wrong output; transformers reads it from the config"
            )
    return warnings


def plan_warnings(config: PreTrainedConfig, plan: Plan) -> list[str]:
    """`periodic_warnings` of the model that `plan` makes of the one of `config`.

    Raises:
        ArchitectureError: if the edited model cannot be expressed at all.
    """
    return periodic_warnings(edited_config(config, plan.layer_sources()))


def with_warnings(config: PreTrainedConfig, plan: Plan) -> Plan:
    """The plan with these warnings in its selection."""
    selection = plan.selection or Selection(method="by hand", target="", convention="")
    return plan.model_copy(
        update={"selection": selection.model_copy(update={"warnings": tuple(plan_warnings(config, plan))})}
    )


def _first_difference(left: Sequence, right: Sequence) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
