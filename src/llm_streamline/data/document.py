"""Documents: the unit that is hashed, counted once and given to one role; and how long texts are cut into them."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MIN_CHARACTERS = 16  # shorter documents, white space normalised, are dropped: they hold a boundary and no text
PIECE_CHARACTERS = 4_000  # a long text is cut at the first blank line after so many characters
_FIRST_PIECE_CHARACTERS = 400
_READ_AHEAD = 16 * PIECE_CHARACTERS
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*")
_LINE_END = re.compile(r"\n")
_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Document:
    """One document of a text source."""

    text: str
    source: str  # where it is from, for people: file and record
    hash: str  # sha256 in hex of the text with white space normalised

    @classmethod
    def of(cls, text: str, source: str) -> "Document":
        """Make a document of `text`; half a surrogate pair, which JSON allows, becomes U+FFFD."""
        try:
            text.encode()
        except UnicodeEncodeError:  # tokenizers refuse it
            text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        return cls(text, source, document_hash(text))

    @property
    def is_near_empty(self) -> bool:
        """Whether there is too little in it to count as a document."""
        head = self.text[: 16 * MIN_CHARACTERS]  # nearly always enough to tell
        return all(len(" ".join(text.split())) < MIN_CHARACTERS for text in (head, self.text))


def document_hash(text: str) -> str:
    """Sha256 in hex of `text` with every run of white space turned into one space and the ends stripped."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """Leave out near-empty documents and the second and later copies of a document."""
    seen: set[bytes] = set()
    for document in documents:
        key = bytes.fromhex(document.hash)
        if key not in seen and not document.is_near_empty:
            seen.add(key)
            yield document


def cut_text(chunks: Iterable[str], *, fine_start: bool = True) -> Iterator[str]:
    """Cut one long text into pieces that serve as documents, holding little of it in memory.

    A piece ends at the first blank line after about 4,000 characters; where none follows within as many again, at a
    line end; where none follows either, at white space; and at last anywhere. A text shorter than that stays whole,
    unless `fine_start`: then the first 100,000 characters are cut finer, from 400 characters up (a 25th of the place in
    the text), so that even a small file has enough pieces for every role of the split. Pieces depend on the text alone.

    Args:
        chunks: the text in consecutive parts of any size.
        fine_start: whether the start of the text is cut finer.

    Yields:
        Pieces without white space at their ends; together they are the text, but for the white space at the cuts.
    """
    buffer, place, offset = "", 0, 0  # offset: start of the next piece in buffer; place: of the same in the text
    chunks = iter(chunks)
    while True:
        while len(buffer) - offset < _READ_AHEAD and (chunk := next(chunks, None)) is not None:
            buffer, offset = buffer[offset:] + chunk, 0
        if offset >= len(buffer):
            return
        size = PIECE_CHARACTERS
        if fine_start:
            size = min(PIECE_CHARACTERS, max(_FIRST_PIECE_CHARACTERS, place // 25))
        stop = _piece_end(buffer, offset, size)
        if piece := buffer[offset:stop].strip():
            yield piece
        place, offset = place + stop - offset, stop


def _piece_end(buffer: str, start: int, size: int) -> int:
    """End of the piece of about `size` characters that starts at `start`; white space after it included."""
    for pattern, first, last in ((_BLANK_LINE, 1, 2), (_LINE_END, 1, 4), (_SPACE, 2, 4)):
        if match := pattern.search(buffer, start + first * size, start + last * size):
            return match.end()
    # nowhere to cut: the end of the text may be near, otherwise cut between any two characters
    return len(buffer) if len(buffer) - start <= 2 * size else min(len(buffer), start + 4 * size)
