"""Facts about a model's architecture: where its decoder layers are and what is inside one, found rather than guessed.

The layers are the one ModuleList as long as the text config's layer count; layer indices are the integers that count
0, 1, 2 ... along it; only what structure cannot tell comes from the family's row (`families.py`). Silencing a sublayer
lives here too, because it is nothing but applying those facts. Letters: L layers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_streamline.errors import ArchitectureError
from llm_streamline.families import FAMILIES, REFUSED, REFUSED_SETTINGS, WRAPPERS, Family
from llm_streamline.layer_config import text_config
from llm_streamline.structure import (
    IndexField,
    final_norm_path,
    find_layers_path,
    first_present,
    index_fields,
    is_module,
    path_of,
    present,
)


@dataclass(frozen=True)
class MlpFacts:
    """One layer's MLP. Names are paths inside the layer; None when there is no such projection."""

    kind: str  # "gated", "plain", "moe" or "none"
    gate: str | None
    up: str | None
    gate_up: str | None  # gate above up in one projection, along the output
    down: str | None
    activation: str | None  # name in transformers.activations.ACT2FN
    transposed: bool  # weights are (in, out), as GPT-2's Conv1D stores them
    width: int | None  # channels of the inner state


@dataclass(frozen=True)
class ArchSpec:
    """What surgery needs to know about one model. Paths without a note are inside a decoder layer."""

    model_type: str  # of the text config
    num_layers: int
    layers: str  # path of the ModuleList from the model
    embeddings: str  # path of the input embedding from the model
    final_norm: str | None  # path from the model, None when the decoder has none
    head: str | None  # path of the output embedding from the model
    attention_out: tuple[str, ...]  # projections that write to the residual stream; a layer has some of them
    mlp_out: tuple[str, ...]
    attention_norm_in: str | None
    mlp_norm_in: str | None
    attention_norm_out: str | None  # norm between sublayer and residual stream (Gemma-2, OLMo-2)
    mlp_norm_out: str | None
    silent_norm_weight: float  # weight at which a norm_out puts out exactly zero
    activation: str | None  # the MLP's, a name in transformers.activations.ACT2FN
    parallel: bool  # attention and MLP read the same state
    identity_obstacle: str | None  # why no weights make a layer the identity; None when some do
    index_fields: tuple[IndexField, ...]
    tied_head: bool
    family: Family


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise ArchitectureError if models of `config` are not edited; needs no weights, so ask before loading them."""
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"{config.model_type} is an encoder-decoder model; only decoder-only models can be cut")
    text = text_config(config)
    if text.model_type in REFUSED:
        raise ArchitectureError(f"{text.model_type} cannot be cut: {REFUSED[text.model_type]}")
    family = FAMILIES.get(text.model_type)
    if family is None or (text is not config and config.model_type not in WRAPPERS):
        name = text.model_type if family is None else f"{text.model_type} inside {config.model_type}"
        known = ", ".join(sorted((*FAMILIES, *WRAPPERS)))
        raise ArchitectureError(
            f"{name} is untested: removing its layers was never proven sound; tested families: {known}"
        )
    for condition in (*family.refused, *REFUSED_SETTINGS):
        if condition.holds(text):
            raise ArchitectureError(f"{text.model_type} with {condition.key} cannot be cut: {condition.reason}")


def find_arch(model: PreTrainedModel) -> ArchSpec:
    """Find the facts of `model`.

    Raises:
        ArchitectureError: if its family is untested or refused, or its structure is not what the family's row says.
    """
    _check_plain(model)
    check_architecture(model.config)
    text = text_config(model.config)
    family = FAMILIES[text.model_type]
    path = find_layers_path(model, text)
    layers = model.get_submodule(path)
    owner = path.rpartition(".")[0]
    first = _first_stock_layer(layers, family, text.model_type)
    obstacle = next((c.reason for c in family.not_identity if c.holds(text)), None)
    return ArchSpec(
        model_type=text.model_type,
        num_layers=len(layers),
        layers=path,
        embeddings=path_of(model, model.get_input_embeddings()),
        final_norm=final_norm_path(model, owner),
        head=path_of(model, model.get_output_embeddings()),
        attention_out=family.attention_out,
        mlp_out=family.mlp_out,
        attention_norm_in=first_present(first, family.attention_norm_in),
        mlp_norm_in=first_present(first, family.mlp_norm_in),
        attention_norm_out=first_present(first, family.attention_norm_out),
        mlp_norm_out=first_present(first, family.mlp_norm_out),
        silent_norm_weight=family.silent_norm_weight,
        activation=_activation(text, family),
        parallel=family.parallel if isinstance(family.parallel, bool) else any(c.holds(text) for c in family.parallel),
        identity_obstacle=obstacle,
        index_fields=index_fields(layers),
        tied_head=bool(getattr(text, "tie_word_embeddings", False)),
        family=family,
    )


def get_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of `model`, a live view: what is put into it is in the model."""
    return model.get_submodule(find_layers_path(model, text_config(model.config)))


def identity_possible(arch: ArchSpec) -> bool:
    """Whether some weights make a layer the identity; if not, `arch.identity_obstacle` says why."""
    return arch.identity_obstacle is None


def mlp_facts(layer: nn.Module, arch: ArchSpec) -> MlpFacts:
    """What kind of MLP `layer` has and where its projections are."""
    family = arch.family
    down = first_present(layer, family.mlp_out)
    gate, up = first_present(layer, family.gate), first_present(layer, family.up)
    gate_up = first_present(layer, family.gate_up)
    if down is None:
        return MlpFacts("none", None, None, None, None, None, False, None)
    projection = layer.get_submodule(down) if is_module(layer, down) else None
    if projection is None or len(present(layer, family.mlp_out)) > 1:
        return MlpFacts("moe", None, None, None, None, arch.activation, False, None)
    transposed = not isinstance(projection, nn.Linear) and type(projection).__name__ == "Conv1D"
    width = projection.weight.shape[0 if transposed else 1]
    kind = "gated" if gate or gate_up else "plain"
    return MlpFacts(kind, gate, up, gate_up, down, arch.activation, transposed, width)


def fold_obstacle(layer: nn.Module, arch: ArchSpec) -> str | None:
    """Why a linear map of the MLP's output cannot be multiplied into `mlp_facts(...).down`; None when it can."""
    facts = mlp_facts(layer, arch)
    if facts.kind == "none":
        return f"{arch.model_type} layers have no MLP"
    if facts.kind == "moe":
        return "the MLP is a mixture of experts: its output is a sum over projections"
    if arch.mlp_norm_out:
        return f"the norm {arch.mlp_norm_out} stands between the MLP and the residual stream"
    return arch.identity_obstacle


def silence_attention(layer: nn.Module, arch: ArchSpec) -> None:
    """Make the attention (or its convolution or state-space stand-in) of `layer` add exactly zero, in place.

    Where a norm follows the sublayer its weight is what is changed: a zero projection in front of a norm would leave
    that norm with a gradient of the size 1 / sqrt(eps).
    """
    _silence(layer, arch, "attention")


def silence_mlp(layer: nn.Module, arch: ArchSpec) -> None:
    """Make the MLP of `layer`, all experts included, add exactly zero, in place."""
    _silence(layer, arch, "mlp")


def silence(layer: nn.Module, arch: ArchSpec) -> None:
    """Make `layer` the identity, in place: it stays trainable, because only last projections (or norms) become zero.

    Raises:
        ArchitectureError: if no weights make a layer of this model the identity.
    """
    silence_attention(layer, arch)
    silence_mlp(layer, arch)


def silencing(layer: nn.Module, arch: ArchSpec, part: str) -> dict[str, float]:
    """What makes a sublayer of `layer` add exactly zero: parameter of the layer -> value of all its elements.

    Args:
        layer: a decoder layer of the model.
        arch: the model's facts.
        part: "attention" or "mlp"; empty result when the layer has no such sublayer.

    Raises:
        ArchitectureError: if no weights silence a sublayer of this model.
    """
    if arch.identity_obstacle:
        raise ArchitectureError(f"a layer of this {arch.model_type} cannot be made silent: {arch.identity_obstacle}")
    projections = arch.attention_out if part == "attention" else arch.mlp_out
    norm = arch.attention_norm_out if part == "attention" else arch.mlp_norm_out
    if norm is not None:
        return {f"{norm}.weight": arch.silent_norm_weight}
    return {name: 0.0 for path in present(layer, projections) for name in _parameters_at(layer, path)}


@torch.no_grad()
def _silence(layer, arch, part):
    for name, value in silencing(layer, arch, part).items():
        layer.get_parameter(name).fill_(value)


def _parameters_at(layer, path):
    """Names of a projection's parameters: a module's own, or a bare tensor and the bias stored beside it."""
    if is_module(layer, path):
        return [f"{path}.{name}" for name, _ in layer.get_submodule(path).named_parameters()]
    owner = layer.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    there = [n for n in (name, f"{name}_bias") if isinstance(getattr(owner, n, None), nn.Parameter)]
    return [f"{path.removesuffix(name)}{n}" for n in there]


def _check_plain(model) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ArchitectureError(
            f"{type(model).__name__} is a wrapper (compiled, distributed or an adapter); "
            "give the transformers model inside, with adapters merged"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ArchitectureError("the model carries adapters that name layers by index; merge them before cutting")


def _first_stock_layer(layers, family, model_type) -> nn.Module:
    """The first layer of the family's own kind; a replacement network may stand before it."""
    names = family.attention_out + family.mlp_out
    for layer in layers:
        if present(layer, names):
            return layer
    raise ArchitectureError(
        f"the layers of this {model_type} have none of {', '.join(names)}: not what transformers builds for this family"
    )


def _activation(text, family) -> str | None:
    names = (getattr(text, key, None) for key in family.activation)
    return next((name for name in names if isinstance(name, str)), family.fixed_activation)
