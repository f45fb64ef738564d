"""The healing ladder: which of the original's own parameters each rung trains, beside the replacement.

    replacement   none
    lora          none, but adapters beside the projections of the layers
    head          head, final norm and the last k layers (Lu et al., "Reassessing Layer Pruning", arXiv:2411.15558)
    above         every layer from the first edit up, and the final norm
    norms         every norm
    full          everything

Chosen by module identity and exact path, never by a part of a name: "layers.2" is in the names of layers 20 to 29.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from llm_streamline.arch import ArchSpec
from llm_streamline.config import TrainingConfig
from llm_streamline.errors import ArchitectureError, ConfigError
from llm_streamline.schema import did_you_mean


def layer_names(
    rung: str, layer: nn.Module, position: int, num_layers: int, last_layers: int, first_edit: int
) -> set[str]:
    """Paths inside a decoder layer of the parameters that a rung trains.

    Args:
        rung: a value of `training.trainable`.
        layer: the layer at `position`.
        position: its index in the edited model.
        num_layers: of the edited model.
        last_layers: k of the rung `head`.
        first_edit: position of the first layer that is not, or does not follow, what it was in the original.
    """
    first = {"full": 0, "above": first_edit, "head": num_layers - last_layers}.get(rung, num_layers)
    if position >= first:
        return {name for name, _ in layer.named_parameters()}
    return set(_norm_names(layer)) if rung == "norms" else set()


def outside_names(rung: str, model: nn.Module, arch: ArchSpec) -> dict[str, set[str]]:
    """Path of a module outside the layers -> names of its parameters that a rung trains.

    Raises:
        ArchitectureError: if a parameter belongs to a module that holds the layers as well.
    """
    if rung in ("head", "above"):
        paths = [path for path in (arch.final_norm, arch.head if rung == "head" else None) if path]
        return {path: {name for name, _ in model.get_submodule(path).named_parameters()} for path in paths}
    if rung not in ("norms", "full"):
        return {}
    found = {}
    for path, module in _modules_outside(model, arch):
        names = {name for name, parameter in module._parameters.items() if parameter is not None}
        if names and (rung == "full" or is_norm(module)):
            if arch.layers.startswith(f"{path}."):
                raise ArchitectureError(
                    f"{path} of this {arch.model_type} has parameters beside its layers: not healed"
                )
            found[path] = names
    return found


def _modules_outside(model: nn.Module, arch: ArchSpec) -> Iterator[tuple[str, nn.Module]]:
    """The decoder's modules that are not in a layer, and the head; a vision tower beside the decoder is left alone."""
    decoder = arch.layers.rpartition(".")[0]
    for path, module in model.named_modules():
        in_layers = f"{path}.".startswith(f"{arch.layers}.")
        in_decoder = f"{path}.".startswith(f"{decoder}.")
        if path and not in_layers and (in_decoder or path == arch.head):
            yield path, module


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm of any kind: transformers names each family's own class so."""
    return "norm" in type(module).__name__.lower()


def _norm_names(layer: nn.Module) -> Iterator[str]:
    for path, module in layer.named_modules():
        if is_norm(module):
            yield from (f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False))


def projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Path inside a layer -> linear projection: what an adapter can stand beside. Packed experts are none."""
    return {
        path: module
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def adapted_names(layer: nn.Module, config: TrainingConfig) -> set[str]:
    """Paths inside a layer of the projections that `training.heal.targets` names; all of them when it names none."""
    wanted = set(config.heal.targets)
    return {path for path in projections(layer) if not wanted or path.rpartition(".")[2] in wanted}


def check_targets(layers: Sequence[nn.Module], config: TrainingConfig) -> None:
    """Refuse adapters beside projections that no layer has.

    Raises:
        ConfigError: with the names that do exist.
    """
    known = sorted({path.rpartition(".")[2] for layer in layers for path in projections(layer)})
    for name in config.heal.targets:
        if name not in known:
            raise ConfigError(
                f"training.heal.targets: no projection '{name}' in these layers.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}"
            )
