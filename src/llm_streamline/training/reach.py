"""How far training reaches when the user does not say: as far as helps, where memory allows it.

The rule is plain numbers, without torch: the simulator asks it too, for a machine that is not there.
"""

from typing import TYPE_CHECKING, Literal

from llm_streamline import ranks
from llm_streamline.config import Recipe
from llm_streamline.logs import get_logger
from llm_streamline.runtime import total_bytes

if TYPE_CHECKING:
    from llm_streamline.sources import LoadedModel

_BYTES_A_PARAMETER = 16  # float32 copy, gradient, and AdamW's two moments
_SHARE = 0.5  # of the memory there is, for weights and what is trained; the rest is for activations and logits
log = get_logger()


def settle_reach(recipe: Recipe, loaded: "LoadedModel", has_network: bool) -> Recipe:
    """The recipe with `training.trainable` decided, where it says auto.

    What is free at the moment plays no part, so that the same machine always decides the same.

    Args:
        recipe: what is wished for.
        loaded: the original.
        has_network: whether a network is put back.
    """
    if recipe.training.trainable != "auto":
        return recipe
    from llm_streamline.offload import is_streamed

    is_split = ranks.wants_sharding() or is_streamed(loaded.model)  # asked here: alone, rank 0 shares nothing out
    decided = with_reach(recipe, ranks.from_main(lambda: _reach_here(recipe, loaded, has_network, is_split)))
    if decided.training.tokens and decided.training.heals:
        log.info("every layer above the replacement is trained too; --trainable replacement leaves them as they are")
    return decided


def with_reach(recipe: Recipe, reach: str) -> Recipe:
    """The recipe with `training.trainable` set."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"trainable": reach})})


def auto_reach(
    recipe: Recipe, has_network: bool, weight_bytes: int, layer_parameters: int, memory_bytes: float, is_split: bool
) -> Literal["above", "replacement"]:
    """What `training.trainable: auto` stands for.

    A network is put back, and training looks at predictions or at later states: every layer `above` trains too, if
    weights and trained copies fit into half of the memory of the device. Otherwise the replacement alone.

    Args:
        recipe: objective, limit of memory, quantization.
        has_network: whether a network is put back.
        weight_bytes: of the original, as it is run.
        layer_parameters: of all its layers together.
        memory_bytes: that the device has, or all over which the layers are spread, used or not.
        is_split: the original's weights lie on disk, or are shared out over several devices.
    """
    if not has_network or not set(recipe.training.objective) - {"mse"}:
        return "replacement"
    if recipe.max_memory or recipe.quantization != "none" or is_split:
        return "replacement"
    fits = weight_bytes + _BYTES_A_PARAMETER * layer_parameters <= _SHARE * memory_bytes
    return "above" if fits else "replacement"


def _reach_here(recipe: Recipe, loaded: "LoadedModel", has_network: bool, is_split: bool) -> str:
    from llm_streamline.arch import get_layers

    weight_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    in_layers = sum(p.numel() for layer in get_layers(loaded.model) for p in layer.parameters())
    devices = {p.device for p in loaded.model.parameters() if not p.is_meta} or {loaded.device}
    memory_bytes = sum(total_bytes(device) for device in devices)
    return auto_reach(recipe, has_network, weight_bytes, in_layers, memory_bytes, is_split)
