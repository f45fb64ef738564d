"""Text sources: anything that yields documents, in the same order every time, without holding them all."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.data.document import Document, distinct
from llm_streamline.data.files import file_documents, file_kind, find_files, probe_file, whole_file
from llm_streamline.data.spec import TextSpec, parse_spec
from llm_streamline.errors import TextError
from llm_streamline.files import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHUFFLE_CHARACTERS = 8_000_000  # documents are shuffled within blocks of so much text, about 2 M tokens


class TextSource(ABC):
    """One source of documents."""

    block_characters = SHUFFLE_CHARACTERS  # read at once, and shuffled, when windows are made

    def __init__(self, spec: TextSpec):
        self.spec = spec

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A string that is another one when the text may be another one."""

    @abstractmethod
    def records(self) -> Iterator[Document]:
        """Everything there is, in a fixed order: near-empty documents and copies included."""

    def records_for(self, role: str, seed: int) -> Iterator[Document] | None:
        """Documents written for one role on demand; None when there is one text that must be split."""
        return None

    def documents(self) -> Iterator[Document]:
        """The documents in a fixed order, streamed; near-empty ones and second copies left out.

        Raises:
            TextError: as soon as something unreadable is met.
        """
        return distinct(self.records())


class FileText(TextSource):
    """Documents of the files that a path or glob stands for."""

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        self.paths = find_files(spec)
        for path in self.paths:
            probe_file(path, spec)

    @property
    def fingerprint(self) -> str:
        """Names and contents of the files: a time of change would depend on clocks and on how a file was copied."""
        return f"{self.spec.field}|" + "|".join(f"{path.name} {sha256_of(path)}" for path in self.paths)

    def records(self) -> Iterator[Document]:
        """Documents of one file after the other."""
        for path in self.paths:
            yield from file_documents(path, self.spec)


def open_text(
    spec: str | TextSpec,
    *,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seed: int = 0,
) -> TextSource:
    """Open a text source; what can be checked cheaply is checked here.

    Args:
        spec: see `parse_spec`.
        model: writes the text of `self`; not used otherwise.
        tokenizer: of `model`.
        seed: of what `self` writes.

    Raises:
        TextError: if the source is missing, empty, corrupt, binary, not UTF-8, or has no such field.
        MissingExtraError: if a package for it is not installed.
    """
    spec = parse_spec(spec)
    if spec.kind == "builtin":
        from llm_streamline.data.builtin import BuiltinText

        return BuiltinText(spec)
    if spec.kind == "hub":
        from llm_streamline.data.hub import HubText

        return HubText(spec)
    if spec.kind == "self":
        from llm_streamline.data.self_text import SelfText

        if model is None or tokenizer is None:
            raise TextError(
                "text 'self' is written by the model, and no model is loaded here; name a file or `builtin`"
            )
        return SelfText(spec, model, tokenizer, seed)
    return FileText(spec)


def read_whole_text(path: str | Path | TextSpec, *, max_characters: int | None = None) -> str:
    """One whole text, for perplexity.

    A single .txt file (packed or not) is taken as it stands, every byte of it. Of anything else (.jsonl, .parquet, a
    glob, a Hub data set, `builtin`) the documents are joined by one blank line, near-empty ones and copies left out.

    Args:
        path: a path or a text specification.
        max_characters: read no further than this; large data sets on the Hub have no practical end.

    Raises:
        TextError: if it cannot be read or holds no text.
    """
    spec = path if isinstance(path, TextSpec) else parse_spec(str(path))
    source = open_text(spec)
    if isinstance(source, FileText) and len(source.paths) == 1 and file_kind(source.paths[0]) == "txt":
        text = whole_file(source.paths[0])
    else:
        text = "\n\n".join(_up_to(source.documents(), max_characters))
    text = text[:max_characters]
    if not text.strip():
        raise TextError(f"text '{spec.text}' holds nothing but white space")
    return text


def _up_to(documents: Iterator[Document], max_characters: int | None) -> Iterator[str]:
    num_characters = 0
    for document in documents:
        yield document.text
        num_characters += len(document.text)
        if max_characters is not None and num_characters >= max_characters:
            return


def text_hash(*parts: Any) -> str:
    """Sha256 in hex of the parts' strings, with their boundaries."""
    joined = "\0".join(f"{len(str(part))}:{part}" for part in parts)
    return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()
