"""Text in, windows of tokens out: sources, mixtures, the split by document hash, packing. Names are imported lazily."""

from importlib import import_module

_HOME = {
    "Document": "document",
    "TextSpec": "spec",
    "parse_spec": "spec",
    "TextSource": "text",
    "open_text": "text",
    "read_whole_text": "text",
    "ROLES": "splits",
    "role_of": "splits",
    "Windows": "windows",
    "check_disjoint": "windows",
    "WindowNeed": "prepare",
    "prepare_windows": "prepare",
    "PerplexityWindows": "perplexity",
    "perplexity_windows": "perplexity",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
