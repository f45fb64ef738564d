import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_streamline.data.spec import parse_spec
from llm_streamline.errors import TextError


@pytest.mark.parametrize(
    ("spec", "kind", "source", "weight", "field"),
    [
        ("builtin", "builtin", "builtin", 1.0, "text"),
        ("0.3*builtin", "builtin", "builtin", 0.3, "text"),
        (" 2 ".strip() + "*self", "self", "self", 2.0, "text"),
        ("corpus/a.txt", "files", "corpus/a.txt", 1.0, "text"),
        ("0.7*corpus/*.jsonl.gz#body", "files", "corpus/*.jsonl.gz", 0.7, "body"),
        (".5*a.jsonl", "files", "a.jsonl", 0.5, "text"),
        ("1e-2*a.jsonl", "files", "a.jsonl", 0.01, "text"),
        ("./2024*.txt", "files", "./2024*.txt", 1.0, "text"),
        ("**/*.txt", "files", "**/*.txt", 1.0, "text"),
        ("notes#1/a.txt", "files", "notes#1/a.txt", 1.0, "text"),
        ("C#/a#b/c.jsonl#q a", "files", "C#/a#b/c.jsonl", 1.0, "q a"),
    ],
)
def test_a_spec_says_weight_source_and_field(spec, kind, source, weight, field):
    parsed = parse_spec(spec)
    assert (parsed.kind, parsed.source, parsed.weight, parsed.field) == (kind, source, weight, field)
    assert parse_spec(parsed) is parsed


def test_a_hub_spec_says_name_config_and_split():
    parsed = parse_spec("0.25*hub:org/name:en@validation[:5%]#body")
    assert (parsed.kind, parsed.source, parsed.config, parsed.split) == ("hub", "org/name", "en", "validation[:5%]")
    assert (parsed.weight, parsed.field) == (0.25, "body")
    plain = parse_spec("hub:org/name")
    assert (plain.source, plain.config, plain.split, plain.field) == ("org/name", None, "train", "text")


@pytest.mark.parametrize(
    "spec",
    ["", "  ", "0*builtin", "0.5*", "a.jsonl#", "#text", "hub:", "hub:@train", "hub:a:@b", "hub:a@", "builtin#x"],
)
def test_a_spec_that_names_nothing_is_refused_in_one_sentence(spec):
    with pytest.raises(TextError, match="text '"):
        parse_spec(spec)


@given(st.text(max_size=40))
def test_any_string_is_parsed_or_refused(spec):
    try:
        parsed = parse_spec(spec)
    except TextError:
        return
    assert parsed.source
    assert parsed.weight > 0
