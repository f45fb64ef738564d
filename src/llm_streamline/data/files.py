"""Text from local files: .txt, .jsonl and .parquet, plain or packed with gzip or zstandard, streamed.

Every problem with a file is a `TextError` that names the file and, where there is one, the line.
"""

import glob
import io
import json
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from llm_streamline.data.document import Document, cut_text
from llm_streamline.data.packed import open_packed, split_packing
from llm_streamline.data.spec import TextSpec
from llm_streamline.errors import TextError

KINDS = {".txt": "txt", ".text": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_CHUNK_CHARACTERS = 1 << 20
_PROBE_BYTES = 1 << 16
_PARQUET_ROWS = 256


def find_files(spec: TextSpec) -> list[Path]:
    """The files a path or glob stands for, in a fixed shuffled order.

    Shuffled, because a glob's files are often sorted by subject and a small budget would see the first subject only;
    fixed, because documents must come in the same order every time.

    Raises:
        TextError: if there is no such file, it is a folder, or its kind is not known.
    """
    source = str(Path(spec.source).expanduser())
    if Path(source).is_dir():
        raise TextError(f"text '{spec.text}' is a folder; name the files in it, for example {source}/*.jsonl")
    if Path(source).is_file():
        paths = [Path(source)]
    else:
        paths = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        if not paths:
            what = "no file matches" if glob.has_magic(source) else "no such file:"
            weighted = (
                "; the number before '*' was read as a weight" if spec.text != spec.source and "*" in spec.text else ""
            )
            raise TextError(f"text '{spec.text}': {what} {source}{weighted}")
    for path in paths:
        if file_kind(path) != "txt":
            continue
        if spec.has_field:
            raise TextError(f"text '{spec.text}': {path.name} is plain text and has no fields; leave out #{spec.field}")
    random.Random(0).shuffle(paths)
    return paths


def file_kind(path: Path) -> str:
    """The kind of file by its name without packing: txt, jsonl or parquet.

    Raises:
        TextError: for any other name.
    """
    plain, packing = split_packing(path)
    kind = KINDS.get(Path(plain).suffix.lower())
    if kind is None or (kind == "parquet" and packing):
        raise TextError(f"{path}: not a kind of text we read; it must end in .txt, .jsonl (also .gz, .zst) or .parquet")
    return kind


def probe_file(path: Path, spec: TextSpec) -> None:
    """Read the beginning of a file, so that a wrong one is refused before any slow work.

    Raises:
        TextError: if it is empty, corrupt, binary or not UTF-8, or its first record lacks the field.
    """
    if path.stat().st_size == 0:
        raise TextError(f"{path} is empty; a text source must hold some text")
    kind = file_kind(path)
    if kind == "parquet":
        _parquet(path, spec).close()
        return
    with _problems_named(path), open_packed(path) as file:
        head = file.read(_PROBE_BYTES)
    whole = len(head) < _PROBE_BYTES
    _check_utf8(path, head, whole)
    if whole and not head.strip():
        raise TextError(f"{path} holds nothing but white space; a text source must hold some text")
    if kind == "jsonl":
        for _ in _jsonl_texts(path, spec):
            break


def file_documents(path: Path, spec: TextSpec) -> Iterator[Document]:
    """The documents of one file in order; a .txt file is cut at blank lines (`cut_text`).

    Raises:
        TextError: as soon as the file turns out corrupt, binary or not UTF-8, or a record lacks the field.
    """
    kind = file_kind(path)
    if kind == "txt":
        for number, piece in enumerate(cut_text(_text_chunks(path))):
            yield Document.of(piece, f"{path.name}: piece {number + 1}")
        return
    texts: Callable = _jsonl_texts if kind == "jsonl" else _parquet_texts
    word = "line" if kind == "jsonl" else "row"
    for number, text in texts(path, spec):
        yield Document.of(text, f"{path.name}: {word} {number}")


def whole_file(path: Path) -> str:
    """A .txt file's text as it stands: every byte of it, line ends included; only a byte order mark is left out.

    Raises:
        TextError: if it is corrupt, binary or not UTF-8.
    """
    with _problems_named(path), open_packed(path) as file:
        content = file.read()
    _check_utf8(path, content, whole=True)
    return content.decode("utf-8-sig")


def _text_chunks(path: Path) -> Iterator[str]:
    with _open_text(path) as file:
        while chunk := file.read(_CHUNK_CHARACTERS):
            if "\0" in chunk:
                raise TextError(_binary(path))
            yield chunk


def _jsonl_texts(path: Path, spec: TextSpec) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text); a null field is an empty text."""
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as problem:
                binary = "\0" in line[:_PROBE_BYTES]
                raise TextError(_binary(path) if binary else f"{path}, line {number}: not JSON ({problem})") from None
            yield number, text_of_record(record, spec.field, f"{path}, line {number}")


def text_of_record(record: object, field: str, where: str) -> str:
    """The text of one record; a null is an empty text.

    Raises:
        TextError: if there is no such field or it holds no text; the message begins with `where`.
    """
    if not isinstance(record, dict):
        raise TextError(f"{where}: expected a JSON object with a field '{field}', got {type(record).__name__}")
    if field not in record:
        raise TextError(f"{where}: no field '{field}'; {_offer(list(record))}")
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise TextError(f"{where}: field '{field}' holds {type(text).__name__}, not text; {_offer(list(record))}")
    return text or ""


def _offer(fields: list[str]) -> str:
    if not fields:
        return "the record has no fields at all"
    return f"there are {', '.join(map(str, fields[:12]))}; name one after '#', as in data.jsonl#{fields[0]}"


def _parquet(path: Path, spec: TextSpec):
    """Open a parquet file and check that it has rows and a column of strings by the field's name."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as problem:
        raise TextError(f"{path} is no readable parquet file: {str(problem).splitlines()[0]}") from None
    names = file.schema_arrow.names
    if spec.field not in names:
        raise TextError(f"{path}: no column '{spec.field}'; {_offer(names)}")
    kind = file.schema_arrow.field(spec.field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise TextError(f"{path}: column '{spec.field}' holds {kind}, not text; {_offer(names)}")
    if file.metadata.num_rows == 0:
        raise TextError(f"{path} is empty: it has no rows")
    return file


def _parquet_texts(path: Path, spec: TextSpec) -> Iterator[tuple[int, str]]:
    """Yield (row number from 1, text); a null is an empty text."""
    import pyarrow

    number = 0
    with _parquet(path, spec) as file:
        try:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[spec.field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield number, text or ""
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
            raise TextError(f"{path}, after row {number}: {str(problem).splitlines()[0]}") from None


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    with _problems_named(path), open_packed(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        try:
            yield text
        except UnicodeDecodeError:
            raise TextError(_where_not_utf8(path)) from None


@contextmanager
def _problems_named(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise TextError(f"{path} is truncated: its packing ends too early; fetch the file again") from None
    except (OSError, zlib.error) as problem:  # gzip.BadGzipFile is an OSError
        raise TextError(f"{path} cannot be read: {problem}") from None


def _check_utf8(path: Path, content: bytes, whole: bool) -> None:
    if b"\0" in content:
        raise TextError(_binary(path))
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as problem:
        if whole or len(content) - problem.start > 3:  # the read may have stopped inside a character
            raise TextError(
                _not_utf8(path, content[: problem.start].count(b"\n") + 1, content[problem.start])
            ) from None


def _where_not_utf8(path: Path) -> str:
    """Read again by bytes, to name the line: the text layer decodes ahead of it."""
    with open_packed(path) as file:
        return _first_bad_line(path, file)


def _first_bad_line(path: Path, file: BinaryIO) -> str:
    for number, line in enumerate(file, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as problem:
            return _not_utf8(path, number, line[problem.start])
    return f"{path} is not UTF-8 text"


def _not_utf8(path: Path, line: int, byte: int) -> str:
    return f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; convert the file, for example with iconv -t UTF-8"


def _binary(path: Path) -> str:
    return f"{path} looks binary (it has zero bytes); a text source must be UTF-8 text"
