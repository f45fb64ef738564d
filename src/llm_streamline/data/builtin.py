"""Text that every Python installation carries: the language reference's topics, then the standard library's docstrings.

About 0.1 M tokens of topics and 0.4 M of docstrings: technical English. Nothing is imported or run: sources are parsed.
"""

import ast
import importlib.util
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from llm_streamline.data.document import Document, cut_text
from llm_streamline.data.spec import TextSpec
from llm_streamline.data.text import TextSource
from llm_streamline.errors import TextError

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "ensurepip")
)
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class BuiltinText(TextSource):
    """Prose of this Python installation; other versions of Python hold other text."""

    block_characters = 400_000  # the topics come first and are enough for small budgets

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        if next(self.records(), None) is None:
            raise TextError("text 'builtin': this Python carries neither pydoc_data nor sources; name a file instead")

    @property
    def fingerprint(self) -> str:
        """The version of Python."""
        return f"python {sys.version}"

    def records(self) -> Iterator[Document]:
        """Topics by name, then docstrings file by file in a fixed shuffled order, cut at about 4,000 characters."""
        for topic, text in sorted(_topics().items()):
            yield from _pieces(text, f"topic {topic}")
        for path, name in _module_files():
            yield from _pieces("\n\n".join(_docstrings(path)), f"docstrings of {name}")


def _pieces(text: str, source: str) -> Iterator[Document]:
    for piece in cut_text([text], fine_start=False):
        yield Document.of(piece, source)


def _topics() -> dict[str, str]:
    if importlib.util.find_spec("pydoc_data") is None:  # some distributions leave it out
        return {}
    from pydoc_data.topics import topics

    return topics


def _module_files() -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED_FOLDERS.intersection(parts[:-1]):
            found.append((path, "/".join(parts)))
    random.Random(0).shuffle(found)
    return found


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and its functions, in the order they are written."""
    try:
        with warnings.catch_warnings(action="ignore"):
            nodes = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError, OSError):
        return  # templates and deliberate bad examples are no prose
    while nodes:
        node = nodes.pop()
        if isinstance(node, _WITH_DOCSTRING) and (text := ast.get_docstring(node)):
            yield text
        nodes.extend(child for child in reversed(getattr(node, "body", ())) if isinstance(child, _WITH_DOCSTRING))
