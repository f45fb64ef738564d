"""Make large language models smaller by removing the layers they do not need. Names are imported when first used."""

from importlib import import_module

from llm_streamline.version import __version__

_HOME = {
    "compress": "pipeline",
    "analyze": "pipeline",
    "make_plan": "pipeline",
    "apply_plan": "pipeline",
    "train_replacement": "pipeline",
    "evaluate": "pipeline",
    "stability": "evaluation.stability",
    "Recipe": "config",
    "load_recipe": "config",
    "Plan": "plan",
    "EvaluationConfig": "evaluation.config",
    "Results": "evaluation.result",
    "StreamlineError": "errors",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
