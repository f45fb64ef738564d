"""The original: loaded as the recipe says, and what a plan and a stage's key keep of it."""

import torch

from llm_streamline.arch import get_layers
from llm_streamline.config import Recipe
from llm_streamline.estimates.budget import Fit
from llm_streamline.logs import get_logger
from llm_streamline.memory_limits import free_memory
from llm_streamline.packed import num_numbers
from llm_streamline.plan import ModelFacts
from llm_streamline.runtime import seed_everything
from llm_streamline.sources import LoadedModel, ModelSource, load_model

log = get_logger()


def load_original(source: ModelSource, recipe: Recipe, fitted: Fit | None = None) -> LoadedModel:
    """Load the model as the recipe says, with all generators seeded; what was fitted into a limit stays on disk."""
    seed_everything(recipe.seed)
    log.info("loading %s", source.spec)
    on_disk = fitted is not None and fitted.layers_on_disk
    loaded = load_model(
        source,
        recipe.dtype,
        recipe.device,
        attention=recipe.attn_implementation,
        quantization=recipe.quantization,
        layers_on_disk=on_disk,
    )
    loaded.fitted = fitted
    return loaded


def unpack(loaded: LoadedModel, recipe: Recipe) -> None:
    """Put the original's own weights in the place of packed ones: what is cut is the original."""
    if recipe.quantization == "none":
        return
    loaded.model = None  # the two are never in memory together
    free_memory()
    loaded.model = load_original(loaded.source, recipe.model_copy(update={"quantization": "none"})).model


def model_facts(loaded: LoadedModel) -> ModelFacts:
    """What a plan keeps of the model."""
    return facts_of(loaded.source, loaded.model)


def facts_of(source: ModelSource, model: torch.nn.Module) -> ModelFacts:
    """What a plan keeps of a model whose weights need not be there."""
    text = model.config.get_text_config()
    return ModelFacts(
        spec=source.spec,
        fingerprint=source.fingerprint,
        model_type=text.model_type,
        num_layers=len(get_layers(model)),
        hidden_size=text.hidden_size,
        num_parameters=sum(num_numbers(p) for p in model.parameters()),
    )


def arithmetic(loaded: LoadedModel, recipe: Recipe) -> str:
    """What the numbers that a model yields depend on beside its weights."""
    return f"{loaded.dtype} {recipe.attn_implementation} {recipe.quantization}"
