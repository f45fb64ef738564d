import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from texts import documents, write_jsonl

from llm_streamline.data import open_text, read_whole_text
from llm_streamline.errors import MissingExtraError, TextError

TEXTS = documents(9)


def texts_of(spec):
    return [document.text for document in open_text(str(spec)).documents()]


def zst(path, content, frames=1):
    zstandard = pytest.importorskip("zstandard")
    size = -(-len(content) // frames)
    parts = [zstandard.ZstdCompressor().compress(content[i : i + size]) for i in range(0, len(content), size)]
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_jsonl_gives_a_document_a_line(tmp_path, packing, field):
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS, field)
    path = tmp_path / f"a.jsonl{packing}"
    if packing == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif packing == ".zst":
        zst(path, plain.read_bytes(), frames=3)
    else:
        plain.rename(path)
    assert texts_of(f"{path}#{field}") == TEXTS
    assert [d.source for d in open_text(f"{path}#{field}").documents()][4] == f"{path.name}: line 5"


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_txt_is_cut_at_blank_lines_and_read_whole_as_it_stands(tmp_path, packing):
    text = "\ufeff" + "\r\n\r\n".join(TEXTS) + "\r\n"
    path = tmp_path / f"a.txt{packing}"
    content = text.encode()
    if packing == ".zst":
        zst(path, content)
    else:
        path.write_bytes(gzip.compress(content) if packing else content)
    assert "\n\n".join(texts_of(path)) == "\n\n".join(TEXTS)
    assert read_whole_text(path) == text[1:]


def test_parquet_gives_a_document_a_row_and_a_null_is_no_document(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": [*TEXTS[:5], None, *TEXTS[5:]], "n": range(10)}), path)
    assert texts_of(path) == TEXTS
    assert [d.source for d in open_text(str(path)).documents()][5] == "a.parquet: row 7"


def test_a_glob_reads_every_file_always_in_the_same_order(tmp_path):
    for number in range(6):
        write_jsonl(tmp_path / f"{number}.jsonl.gz", documents(3, start=10 * number))
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "deep" / "x.jsonl.gz", documents(3, start=90))
    found = texts_of(f"{tmp_path}/**/*.jsonl.gz")
    assert sorted(found) == sorted(t for n in (0, 10, 20, 30, 40, 50, 90) for t in documents(3, start=n))
    assert found == texts_of(f"{tmp_path}/**/*.jsonl.gz")


def test_documents_are_streamed(tmp_path):
    good = json.dumps({"text": TEXTS[0]}) + "\n"
    (tmp_path / "a.jsonl").write_text(good + json.dumps({"text": TEXTS[1]}) + "\nnot json\n")
    stream = open_text(f"{tmp_path}/a.jsonl").documents()
    assert [next(stream).text, next(stream).text] == TEXTS[:2]
    with pytest.raises(TextError, match="line 3: not JSON"):
        next(stream)


def test_read_whole_text_joins_documents_by_a_blank_line(tmp_path):
    assert read_whole_text(write_jsonl(tmp_path / "a.jsonl", TEXTS)) == "\n\n".join(TEXTS)


def test_read_whole_text_stops_where_it_is_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + "not json\n")
    whole = "\n\n".join(TEXTS)
    assert read_whole_text(path, max_characters=700) == whole[:700]
    with pytest.raises(TextError, match="not JSON"):
        read_whole_text(path)


def bad_utf8(path):
    path.write_bytes(b"fine line\n" * 3 + "caf\xe9 au lait\n".encode("latin-1"))


def bad_utf8_far_down(path):
    path.write_bytes(("a fine line of text\n" * 9000).encode() + "caf\xe9\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.txt", None, "no such file"),
        ("*.txt", None, "no file matches"),
        ("a.csv", lambda p: p.write_text("a,b"), "not a kind of text we read"),
        ("a.parquet.gz", lambda p: p.write_text("a,b"), "not a kind of text we read"),
        ("a.txt", lambda p: p.write_text(""), "is empty"),
        ("a.jsonl", lambda p: p.write_text(""), "is empty"),
        ("a.txt", lambda p: p.write_text(" \n\n \n"), "nothing but white space"),
        ("a.txt", lambda p: p.write_bytes(b"\x7fELF\x02\x00\x00 much"), "looks binary"),
        ("a.jsonl", lambda p: p.write_bytes(b'{"text": "x\0"}\n'), "looks binary"),
        ("a.txt", bad_utf8, "line 4: byte 0xe9 is not UTF-8"),
        ("a.jsonl", bad_utf8, "line 4: byte 0xe9 is not UTF-8"),
        ("a.jsonl", lambda p: p.write_text('{"text": 1}'), "line 1: field 'text' holds int, not text"),
        ("a.jsonl", lambda p: p.write_text('\n{"body": "x"}'), "line 2: no field 'text'; there are body"),
        ("a.jsonl", lambda p: p.write_text("[1, 2]"), "line 1: expected a JSON object with a field 'text', got list"),
        ("a.jsonl", lambda p: p.write_text("{}"), "the record has no fields at all"),
        ("a.jsonl", lambda p: p.write_text("text: yes"), "line 1: not JSON"),
        ("a.jsonl", lambda p: p.write_text("[" * 100_000), "line 1: not JSON"),
        ("a.jsonl.gz", lambda p: p.write_text("plain"), "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b'{"text": "x"}\n' * 50)[:-20]), "is truncated"),
        ("a.parquet", lambda p: p.write_text("plain"), "no readable parquet file"),
        ("a.txt", lambda p: p.mkdir(), "is a folder"),
    ],
)
def test_a_bad_file_is_refused_when_it_is_opened(tmp_path, name, make, message):
    if make is not None:
        make(tmp_path / name)
    with pytest.raises(TextError, match=message):
        open_text(str(tmp_path / name))


def test_a_bad_line_far_down_is_named_when_it_is_met(tmp_path):
    bad_utf8_far_down(tmp_path / "a.txt")
    source = open_text(str(tmp_path / "a.txt"))
    with pytest.raises(TextError, match="line 9001: byte 0xe9 is not UTF-8"):
        list(source.documents())


def test_a_truncated_or_wrong_zst_file_is_refused(tmp_path):
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents(300)).encode()
    path = zst(tmp_path / "a.jsonl.zst", content, frames=2)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TextError, match="is truncated"):
        list(open_text(str(path)).documents())
    path.write_bytes(b"plain text, no frame")
    with pytest.raises(TextError, match="not a valid zstandard file"):
        open_text(str(path))


def test_zst_without_the_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "llm-streamline\[zst\]"'):
        open_text(f"{tmp_path}/a.jsonl.zst")


def test_a_parquet_file_without_such_a_text_column_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"body": TEXTS, "n": range(9)}), path)
    with pytest.raises(TextError, match="no column 'text'; there are body, n"):
        open_text(str(path))
    with pytest.raises(TextError, match="column 'n' holds int64"):
        open_text(f"{path}#n")
    pa.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(TextError, match="has no rows"):
        open_text(str(path))


def test_a_field_of_plain_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text that is long enough")
    with pytest.raises(TextError, match="has no fields"):
        open_text(f"{tmp_path}/a.txt#text")


def test_a_number_and_a_star_are_explained_when_no_file_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024a.txt").write_text("some text that is long enough")
    with pytest.raises(TextError, match="was read as a weight"):
        open_text("2024*a.txt")
    assert texts_of("./2024*.txt") == ["some text that is long enough"]
