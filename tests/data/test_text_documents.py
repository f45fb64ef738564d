import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import documents

from llm_streamline.data.document import MIN_CHARACTERS, Document, cut_text, distinct, document_hash
from llm_streamline.data.splits import ROLES, SHARES, role_of


def test_the_hash_is_the_sha256_of_the_text_with_white_space_normalised():
    expected = hashlib.sha256(b"one two three").hexdigest()
    assert document_hash(" one\n two\t\tthree \r\n") == expected == document_hash("one two three")
    assert document_hash("onetwo three") != expected


def test_copies_and_near_empty_documents_are_left_out():
    texts = [
        "a" * MIN_CHARACTERS,
        "a" * (MIN_CHARACTERS - 1),
        " " * 500 + "b" * MIN_CHARACTERS,
        "x " * 4 + " " * 400,
        "",
    ]
    made = [Document.of(text, "here") for text in [*texts, texts[0] + " \n"]]
    assert [document.text for document in distinct(made)] == [texts[0], texts[2]]


def test_half_a_surrogate_pair_becomes_the_replacement_character():
    assert (
        Document.of("broken \ud83d emoji in a document", "here").text == "broken \ufffd\ufffd\ufffd emoji in a document"
    )


def test_a_long_text_is_cut_at_blank_lines_into_about_4000_characters():
    paragraphs = documents(200, 70)
    pieces = list(cut_text(["\n\n".join(paragraphs)], fine_start=False))
    assert [p for piece in pieces for p in piece.split("\n\n")] == paragraphs
    assert all(4_000 <= len(piece) < 4_000 + 800 for piece in pieces[:-1])


def test_a_fine_start_gives_a_small_file_many_pieces():
    text = "\n\n".join(documents(100, 30))  # about 20,000 characters
    assert len(list(cut_text([text]))) > 30
    assert len(list(cut_text([text], fine_start=False))) <= 5


@pytest.mark.parametrize("joint", ["\n", " ", ""])
def test_a_text_without_blank_lines_is_cut_all_the_same(joint):
    text = joint.join(["abcdefghi"] * 20_000)
    pieces = list(cut_text([text], fine_start=False))
    assert max(map(len, pieces)) <= 16_000
    assert "".join(pieces) == re.sub(r"\s", "", text) if joint == "" else " ".join(pieces).split() == text.split()


@given(
    st.lists(st.sampled_from(["word ", "\n", "\n\n", "x" * 900, "y" * 5000 + " ", "  \n \n"]), max_size=60), st.data()
)
def test_pieces_depend_on_the_text_alone_and_lose_nothing(parts, data):
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    whole, in_two = list(cut_text([text])), list(cut_text([text[:cut], text[cut:]]))
    assert whole == in_two
    assert re.sub(r"\s", "", "".join(whole)) == re.sub(r"\s", "", text)


def test_the_split_follows_the_shares_and_only_the_hash():
    roles = [role_of(document_hash(text)) for text in documents(4000, 12)]
    for role, share in SHARES.items():
        spread = (share * (1 - share) / len(roles)) ** 0.5
        assert abs(roles.count(role) / len(roles) - share) < 4 * spread
    assert sum(SHARES.values()) == pytest.approx(1)


def test_the_edges_of_the_split():
    assert role_of("0" * 64) == "evaluation"
    assert role_of("f" * 64) == "train"
    assert role_of("2" + "0" * 63) == "validation"  # 2/16 = 0.125
    assert role_of("4" + "0" * 63) == "calibration"  # 4/16 = 0.25
    assert set(ROLES) == {"calibration", "train", "validation", "evaluation"}
