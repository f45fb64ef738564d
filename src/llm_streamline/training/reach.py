"""How far training reaches when the user does not say: as far as helps, where memory allows it."""

from llm_streamline import ranks
from llm_streamline.arch import get_layers
from llm_streamline.config import Recipe
from llm_streamline.logs import get_logger
from llm_streamline.offload import is_streamed
from llm_streamline.runtime import total_bytes
from llm_streamline.sources import LoadedModel

_BYTES_A_PARAMETER = 16  # float32 copy, gradient, and AdamW's two moments
_SHARE = 0.5  # of the memory there is, for weights and what is trained; the rest is for activations and logits
log = get_logger()


def settle_reach(recipe: Recipe, loaded: LoadedModel, has_network: bool) -> Recipe:
    """The recipe with `training.trainable` decided, where it says auto.

    A network is put back, and training looks at predictions or at later states: every layer `above` trains too, if
    weights and trained copies fit into half of the memory of the device. Otherwise the replacement alone. What is free
    at the moment plays no part, so that the same machine always decides the same.

    Args:
        recipe: what is wished for.
        loaded: the original.
        has_network: whether a network is put back.
    """
    training = recipe.training
    if training.trainable != "auto":
        return recipe
    reach = ranks.from_main(lambda: "above" if has_network and _may_reach_above(recipe, loaded) else "replacement")
    if training.tokens and reach == "above":
        log.info("every layer above the replacement is trained too; --trainable replacement leaves them as they are")
    return recipe.model_copy(update={"training": training.model_copy(update={"trainable": reach})})


def _may_reach_above(recipe: Recipe, loaded: LoadedModel) -> bool:
    if not set(recipe.training.objective) - {"mse"}:
        return False
    if recipe.max_memory or recipe.quantization != "none" or ranks.wants_sharding() or is_streamed(loaded.model):
        return False
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    in_layers = sum(p.numel() for layer in get_layers(loaded.model) for p in layer.parameters())
    return weights + _BYTES_A_PARAMETER * in_layers <= _SHARE * total_bytes(loaded.device)
