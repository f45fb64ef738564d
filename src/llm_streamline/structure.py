"""Finding things in a model by their shape: the list of layers, the numbers that count them, what a layer has.

Nothing here knows the name of a family.
"""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from llm_streamline.errors import ArchitectureError
from llm_streamline.layer_config import text_config

_INDEX_NAME = re.compile(r"(^|_)(layer|block)_?(idx|id|index|number|num)$")


@dataclass(frozen=True)
class IndexField:
    """A place where a layer stores its own index: attribute `name` of submodule `module`, holding index + `offset`."""

    module: str
    name: str
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".lstrip(".")


def find_layers_path(model: nn.Module, text: PreTrainedConfig) -> str:
    """Path of the one ModuleList with an entry for each layer, not inside another one, described by config `text`.

    Raises:
        ArchitectureError: if there is none, or more than one.
    """
    num_layers = text.num_hidden_layers
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    paths = [path for path, _ in lists]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    fitting = [path for path in outer if _described_by(model, path, text)]
    if not fitting:
        raise ArchitectureError(
            f"found no list of {num_layers} decoder layers in {type(model).__name__}; "
            "does the config state the right number of layers?"
        )
    if len(fitting) > 1:
        raise ArchitectureError(
            f"found {len(fitting)} lists of {num_layers} layers in {type(model).__name__} "
            f"({', '.join(fitting)}); cannot tell which are the decoder layers"
        )
    return fitting[0]


def index_fields(layers: nn.ModuleList) -> tuple[IndexField, ...]:
    """Integers that count the layers: by name wherever they occur, by value when every layer has them.

    In a shared view the layers still carry the numbers of the original; the fields are found all the same.
    """
    seen: dict[tuple[str, str], dict[int, int]] = {}
    for index, layer in enumerate(layers):
        for module, submodule in layer.named_modules():
            for name, value in vars(submodule).items():
                if isinstance(value, int) and not isinstance(value, bool):
                    seen.setdefault((module, name), {})[index] = value
    fields = []
    for (module, name), values in seen.items():
        offsets = {value - index for index, value in values.items()}
        counting = len(offsets) == 1 and len(values) == len(layers) > 2
        if counting or _INDEX_NAME.search(name):
            fields.append(IndexField(module, name, offsets.pop() if counting else 0))
    return tuple(fields)


def final_norm_path(model: nn.Module, owner: str) -> str | None:
    """Path of the norm behind the layers, a sibling of their list in the module at path `owner`."""
    norms = [name for name, child in model.get_submodule(owner).named_children() if "Norm" in type(child).__name__]
    return f"{owner}.{norms[-1]}".lstrip(".") if norms else None  # an embedding norm comes before it (Bloom)


def path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """Path at which `module` stands in `model`; None when it does not."""
    return next((path for path, candidate in model.named_modules() if candidate is module), None)


def present(layer: nn.Module, paths: tuple[str, ...]) -> list[str]:
    """Those of `paths` that lead to a module or a parameter of `layer`."""
    found = []
    for path in paths:
        node = layer
        for name in path.split("."):
            node = getattr(node, name, None)
        if isinstance(node, (nn.Module, nn.Parameter)):
            found.append(path)
    return found


def first_present(layer: nn.Module, paths: tuple[str, ...]) -> str | None:
    """The first of `present`, or None."""
    return next(iter(present(layer, paths)), None)


def is_module(layer: nn.Module, path: str) -> bool:
    """Whether `path` leads to a module, rather than to a bare parameter."""
    owner, _, name = path.rpartition(".")
    return name in layer.get_submodule(owner)._modules


def _described_by(model, path, text) -> bool:
    """Whether the nearest module around `path` that has a config has the text model's (a vision tower has its own)."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if isinstance(config, PreTrainedConfig):
            return text_config(config).model_type == text.model_type
    return False
