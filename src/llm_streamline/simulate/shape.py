"""What a model costs, read off its config: built on the meta device, so neither weights nor memory are needed.

Letters: L layers, d width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts")
_SLIDING = ("sliding_attention", "chunked_attention", "local")


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer."""

    parameters: int
    multiplied: int  # parameters that one token is multiplied with: no norms, of the experts only the chosen ones
    inputs: int  # summed input widths of its matrices (of one token), each read once
    outputs: int  # summed output widths
    inner: int  # inputs of the last matrix: what a closed form is solved over
    query_width: int  # heads times width of a query: operations of one score, halved
    value_width: int  # heads times width of a value; both 0 in a layer without attention
    window: int | None  # positions a query sees at most; None: all before it


@dataclass(frozen=True)
class ModelShape:
    """One model."""

    model_type: str
    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    parameters: int  # tied ones once
    head_parameters: int
    element_bytes: int  # of a weight
    max_positions: int | None
    note: str = ""  # why `compress` would refuse this family; empty when it would not

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def parameters_in_layers(self) -> int:
        """Without embedding, head and final norm."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """All weights, in the model's dtype."""
        return self.parameters * self.element_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Key-value cache of one token in all layers, as if each head kept its own key and value: an upper bound."""
        return sum(layer.query_width + layer.value_width for layer in self.layers) * self.element_bytes


def read_shape(model: str, sizes: Sequence[str] = (), dtype: str = "auto") -> ModelShape:
    """Find a config and take its shape.

    Args:
        model: a folder, a config.json, `demo`, a .gguf file, a model type of transformers, or a Hub id.
        sizes: KEY=VALUE settings laid over the config.
        dtype: of the weights; auto: what the config states, bfloat16 where it states nothing or float32.

    Raises:
        SourceError: there is no such config, or it describes no decoder-only model that can be built.
        ConfigError: a size is not written KEY=VALUE, or the config does not know its key.
    """
    return shape_of(find_config(model, sizes), dtype)


def find_config(model: str, sizes: Sequence[str] = ()) -> "PretrainedConfig":
    """The config that `model` names, with `sizes` laid over it; weights need not be there.

    Raises:
        SourceError, ConfigError: see `read_shape`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = dict(_parse_size(text) for text in sizes)
    path = Path(model).expanduser()
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if (path / "config.json").is_file():
        from llm_streamline.sources.checks import read_config

        config = read_config(path, model)
    elif model in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model]()
    elif model == "demo" or path.suffix.lower() == ".gguf":
        from llm_streamline.sources import load_config, resolve_model

        config = load_config(resolve_model(model))
    else:
        config = _hub_config(model)
    if not settings:
        return config
    return _with_sizes(config, settings)


def _parse_size(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise ConfigError(f"a size is written KEY=VALUE, as in num_hidden_layers=32; got '{text}'")
    return key.strip(), yaml.safe_load(value)


def _with_sizes(config: "PretrainedConfig", settings: dict[str, Any]) -> "PretrainedConfig":
    text = config.get_text_config(decoder=True)
    known = text.to_dict()
    for key in settings:
        if key not in known and key not in text.attribute_map:
            from llm_streamline.schema import did_you_mean

            raise ConfigError(f"a {text.model_type} config has no '{key}'.{did_you_mean(key, sorted(known))}")
    if {"num_hidden_layers", text.attribute_map.get("num_hidden_layers")} & settings.keys():
        # lists of one entry a layer are made anew from the family's own pattern
        known = {key: value for key, value in known.items() if key not in ("layer_types", "mlp_layer_types")}
    if "head_dim" not in settings and {"hidden_size", "num_attention_heads"} & settings.keys():
        known.pop("head_dim", None)
    for plain, own in text.attribute_map.items():  # only one of two names for the same thing may be given
        if plain in settings:
            known.pop(own, None)
    try:
        return type(text)(**(known | settings))
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"these sizes fit no {text.model_type}: {str(problem).splitlines()[0]}") from None


def _hub_config(model: str) -> "PretrainedConfig":
    from transformers import AutoConfig

    from llm_streamline.sources.checks import one_line

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise SourceError(
            f"no config for '{model}': give a folder, a config.json, a model type such as llama with --size KEY=VALUE, "
            f"or a Hub id ({one_line(problem)})"
        ) from None


def shape_of(config: "PretrainedConfig", dtype: str = "auto") -> ModelShape:
    """Take the shape of the model that a config describes.

    Raises:
        SourceError: it describes no decoder-only model that can be built.
    """
    import torch

    from llm_streamline.arch import check_architecture, get_layers
    from llm_streamline.errors import ArchitectureError
    from llm_streamline.runtime import check_dtype_name
    from llm_streamline.skeleton import build_skeleton
    from llm_streamline.sources.checks import one_line

    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(f"{config.model_type} is an encoder-decoder model; give a decoder-only one")
    note = ""
    try:
        check_architecture(config)
    except ArchitectureError as problem:
        note = str(problem)
    try:
        model = build_skeleton(config)
        layers = get_layers(model)
    except Exception as problem:  # a foreign constructor on foreign data
        raise SourceError(f"this {config.model_type} config cannot be simulated: {one_line(problem)}") from None
    check_dtype_name(dtype)
    stated = text.dtype if dtype == "auto" else getattr(torch, dtype)
    if not isinstance(stated, torch.dtype) or (dtype == "auto" and stated == torch.float32):
        stated = torch.bfloat16
    head = model.get_output_embeddings()
    return ModelShape(
        model_type=text.model_type,
        layers=tuple(_layer_shape(layer, text, index) for index, layer in enumerate(layers)),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=head.weight.numel() if head is not None else 0,
        element_bytes=stated.itemsize,
        max_positions=getattr(text, "max_position_embeddings", None),
        note=note,
    )


def _layer_shape(layer: "nn.Module", text: "PretrainedConfig", index: int) -> LayerShape:
    total = multiplied = inputs = outputs = inner = 0
    share = _expert_share(text)
    for name, parameter in layer.named_parameters():
        total += parameter.numel()
        if parameter.ndim < 2:
            continue
        part = share if ".experts." in f".{name}" else 1.0
        multiplied += round(parameter.numel() * part)
        # a stack of experts (E, out, in) works like a few matrices side by side
        rows, columns = parameter.shape[-2], parameter.shape[-1]
        many = parameter.numel() // (rows * columns) * part
        inputs, outputs = inputs + round(columns * many), outputs + round(rows * many)
        inner = max(rows, columns)
    query, value = _attention_widths(layer, text, index)
    return LayerShape(total, multiplied, inputs, outputs, inner, query, value, _window(text, index))


def _expert_share(text: "PretrainedConfig") -> float:
    """The share of a mixture's experts that one token is sent to; 1 without experts."""
    count = next((n for key in _EXPERT_COUNTS if isinstance(n := getattr(text, key, None), int) and n), None)
    chosen = next((n for key in _EXPERTS_CHOSEN if isinstance(n := getattr(text, key, None), int) and n), None)
    return min(1.0, chosen / count) if count and chosen else 1.0


def _attention_widths(layer: "nn.Module", text: "PretrainedConfig", index: int) -> tuple[int, int]:
    """Heads by width of queries, and of values; zeros in a layer that attends to nothing (convolution, ...)."""
    kind = _kind(text, index)
    heads = getattr(text, "num_attention_heads", None)
    if kind in ("linear_attention", "conv", "mamba") or not isinstance(heads, int):
        return 0, 0
    if not any("attn" in name or "attention" in name for name, _ in layer.named_modules()):
        return 0, 0
    if getattr(text, "kv_lora_rank", None):
        return heads * (text.qk_nope_head_dim + text.qk_rope_head_dim), heads * text.v_head_dim
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * width, heads * width


def _kind(text: "PretrainedConfig", index: int) -> str | None:
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)
    return kinds[index] if kinds and index < len(kinds) else None


def _window(text: "PretrainedConfig", index: int) -> int | None:
    kind = _kind(text, index)
    names = ("sliding_window", "attention_chunk_size", "window_size")
    window = next((n for key in names if isinstance(n := getattr(text, key, None), int)), None)
    if kind is not None:
        return window if kind in _SLIDING else None
    return window if getattr(text, "use_sliding_window", True) else None
