"""What is refused before a model is loaded, and right after: configs that describe no usable decoder, or lie.

Raises everywhere: `SourceError` with the reason. Only config.json, tensor headers and names are looked at.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import SourceError, StreamlineError
from llm_streamline.logs import get_logger
from llm_streamline.skeleton import build_skeleton
from llm_streamline.sources.weights import Weights, check_inside, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MAX_COUNT = 2**24  # layers, experts, heads: a config that announces more is corrupt and would never finish building


def check_config(folder: Path, spec: str) -> dict[str, Any]:
    """Read config.json and refuse what is no decoder-only causal language model, with the reason."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise SourceError(f"{spec} holds a PEFT adapter, not a model; merge it into its base model first")
        raise SourceError(f"{spec} has no config.json; is it the folder of a model?")
    raw = read_json(check_inside(folder, "config.json", spec))
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"config.json of {spec} names no model_type")
    if "transformers_weights" in raw:
        raise SourceError(f"config.json of {spec} names another weight file (transformers_weights); rename that file")
    method = raw.get("quantization_config")
    if method is not None:
        name = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        raise SourceError(
            f"{spec} is quantised ({name}): its layers cannot be trained or measured; take the unquantised checkpoint"
        )
    _check_counts(raw, spec)
    _check_is_decoder(read_config(folder, spec), raw, spec)
    return raw


def _check_counts(raw: dict[str, Any], spec: str) -> None:
    for key, value in raw.items():
        if isinstance(value, dict):
            _check_counts(value, spec)
        elif re.search(r"layer|expert|head|num_|_size|_dim|n_", key) and type(value) is int and value > _MAX_COUNT:
            raise SourceError(f"config.json of {spec} says {key} = {value}, which is absurd; download it again")


def _check_is_decoder(config: "PretrainedConfig", raw: dict[str, Any], spec: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    want = "give a decoder-only causal language model"
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(f"{spec} is an encoder-decoder model ({kind}); {want}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(f"{spec} is a {kind} model, which transformers does not load as a causal LM; {want}")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise SourceError(f"{spec} is an encoder-only model ({kind}); {want}")
    classes = raw.get("architectures")
    classes = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    heads = [name for name in classes if re.search(r"For[A-Z]", name)]
    if heads and not any(re.search(r"CausalLM|LMHead|ConditionalGeneration", name) for name in heads):
        raise SourceError(f"{spec} has no language-model head ({heads[0]}); {want}")


def read_config(folder: Path, spec: str) -> "PretrainedConfig":
    """Build the configuration that config.json describes; an unknown model_type is refused by name."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in CONFIG_MAPPING:
        code = "; it brings its own code, which is not run" if "auto_map" in raw else ""
        kind = raw.get("model_type")
        raise SourceError(f"{spec} has the unknown model_type {kind!r}{code}; is transformers too old for it?")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.get_text_config(decoder=True)
    except Exception as error:  # a foreign parser on foreign data: whatever it raises, the file cannot be read
        raise SourceError(f"config.json of {spec} cannot be used: {one_line(error)}") from error
    return config


def check_size(config: "PretrainedConfig", weights: Weights, spec: str) -> None:
    """Refuse a config that describes another model than the weights hold, before memory is allocated for it.

    Shapes are compared where files and model name a tensor alike; for the rest a much larger model is refused.
    """
    from llm_streamline.layer_config import CODE_KEY

    try:
        skeleton = build_skeleton(config)
    except Exception as error:  # a foreign constructor on foreign data
        raise SourceError(f"config.json of {spec} describes no model that can be built: {one_line(error)}") from error
    expected = sum(parameter.numel() for parameter in skeleton.parameters())
    if expected > 2 * weights.num_elements + 2**20:
        raise SourceError(
            f"config.json of {spec} describes {expected:,} parameters, its weights hold {weights.num_elements:,}; "
            "download it again"
        )
    if getattr(config.get_text_config(decoder=True), CODE_KEY, None):
        return  # an MLP of ours stands where the stock model has a layer
    for name, wanted in skeleton.state_dict().items():
        header = weights.tensors.get(name)
        if header is not None and header.shape != tuple(wanted.shape):
            raise SourceError(
                f"tensor {name} of {spec} has the shape {list(header.shape)}, its config asks for "
                f"{list(wanted.shape)}; download the model again"
            )


def lacking_weights(model: "PreTrainedModel", weights: Weights) -> list[str]:
    """Names of parameters that no file holds, tied ones aside; none where most names differ, as after a conversion."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = {name for name, _ in model.named_parameters()} - tied
    lacking = sorted(names - weights.tensors.keys())
    return lacking if 2 * len(lacking) < len(names) else []


def check_loading(info: Any, spec: str) -> None:
    """Refuse when a weight would stay random, or when the checkpoint has layers that the config does not know."""

    def keys(name: str) -> list[str]:
        found = info.get(name) if isinstance(info, dict) else getattr(info, name, None)
        return sorted(str(item[0] if isinstance(item, tuple) else item) for item in found or ())

    for name, problem in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        if found := keys(name):
            raise SourceError(f"{spec} {problem} {len(found)} of the weights its config asks for, e.g. {found[0]}")
    unexpected = keys("unexpected_keys")
    layers = [name for name in unexpected if re.search(r"\.\d+\.", f".{name}")]
    if layers:
        raise SourceError(
            f"{spec} holds {len(layers)} weights in layers that its config does not have, e.g. {layers[0]}: does "
            "config.json tell the right number of layers?"
        )
    if unexpected:
        get_logger(__name__).warning("%s holds weights that are not used: %s", spec, ", ".join(unexpected[:5]))


def one_line(error: BaseException) -> str:
    """Return the kind and the beginning of what a library complains about; our own messages stay as they are."""
    if isinstance(error, StreamlineError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else "no message"
    return f"{type(error).__name__}: {text[:300]}"
