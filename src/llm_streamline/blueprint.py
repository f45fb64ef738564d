"""Does a fresh model of the edited config have the layers we kept? Asked before anything is written.

Transformers fixes much of a layer's behaviour when it is built, from the layer's index: sliding window, rotary or not,
dense or mixture of experts, scales. After a cut the index is another one, and what `from_pretrained` builds may differ
from the layer in memory without any error. So the edited config is built once more on the meta device (no memory,
no weights), and every layer is compared with the one we keep: same classes, same tensors, same plain settings.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_streamline.errors import ArchitectureError

# Settings that may differ between a loaded and a fresh model without changing what a layer computes in eval mode.
_IGNORED = frozenset({"training", "gradient_checkpointing", "in_features", "out_features", "nf", "nx"})


def build_blueprint(model: PreTrainedModel, config) -> PreTrainedModel:
    """A model of `model`'s class and `config` on the meta device."""
    with torch.device("meta"):
        return type(model)(config)


def compare_layers(kept: nn.ModuleList, fresh: nn.ModuleList, model_type: str) -> None:
    """Raise ArchitectureError if a layer in `kept` is not what transformers builds in its place.

    Args:
        kept: the edited model's layers, already renumbered.
        fresh: the layers of `build_blueprint(model, edited config)`.
        model_type: for the message.
    """
    for index, (layer, built) in enumerate(zip(kept, fresh, strict=True)):
        ours, theirs = _facts(layer), _facts(built)
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if names:
            name = names[0]
            raise ArchitectureError(
                f"{model_type}: after the cut, loading would build layer {index} with {name} = {theirs.get(name)}, "
                f"but the layer kept there has {ours.get(name)}; its config cannot describe this edit"
            )


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """The numbers, strings and flags a module was built with, by attribute name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _IGNORED and _is_plain(value)
    }


def _facts(layer: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for path, module in layer.named_modules():
        prefix = f"{path}." if path else ""
        facts[f"{prefix}class"] = type(module).__qualname__
        facts |= {prefix + name: value for name, value in plain_settings(module).items()}
    facts |= {f"{name}.shape": tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    return facts


def _is_plain(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
