"""The model card: front matter as the Hub reads it, and a body that a hostile name cannot break."""

import re

import pytest
import yaml
from report_samples import plan, results, write_run

from llm_streamline.report.card import escape_markdown, model_card, read_front_matter, slug, write_card
from llm_streamline.report.run import Run, load_run

BASE_CARD = """---
license: other
license_name: llama3
license_link: https://example.org/LICENSE
language: [en, de]
tags: [theirs]
---
# Their card
"""


@pytest.fixture
def run(tmp_path):
    return load_run(write_run(tmp_path / "run"))


def test_the_front_matter_is_what_the_hub_library_reads(run):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(model_card(run)).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert "llm-streamline" in data.tags
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert measured["wikitext2-valid.txt", "perplexity"] == pytest.approx(36.767, abs=1e-3)
    assert measured["piqa", "accuracy"] == pytest.approx(0.60)
    assert all(re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", r.dataset_type) for r in data.eval_results)


def test_licence_and_language_are_inherited_and_nothing_else(run):
    matter = read_front_matter(model_card(run, base_model="meta/llama", base_card=BASE_CARD))
    assert (matter["license"], matter["license_name"], matter["language"]) == ("other", "llama3", ["en", "de"])
    assert matter["base_model"] == "meta/llama"
    assert "theirs" not in matter["tags"]


def test_what_is_not_known_is_left_out(tmp_path):
    local = Run(tmp_path, "small", plan=plan(spec="/home/me/secret/Llama"))
    text = model_card(local)
    matter = read_front_matter(text)
    assert {"license", "base_model", "model-index"}.isdisjoint(matter)
    assert "/home/me" not in text
    assert "not compared with the original" in text
    assert "The replacement was not trained." in text


def test_the_card_says_what_was_done_lost_and_how_to_repeat_it(run):
    text = model_card(run)
    for part in (
        "were replaced by one decoder layer",
        "## What was lost",
        "Much quality was lost",
        "2.41 ×",
        "## Limits",
    ):
        assert part in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert run.recipe.rstrip() in text
    assert "llm-streamline compress demo" in text
    assert "\u00a0" not in text


def test_hub_data_sets_of_the_recipe_are_named(run):
    recipe = "text:\n  sources: ['0.5*hub:DKYoon/SlimPajama-6B@train#text', builtin]\n"
    matter = read_front_matter(model_card(Run(run.folder, run.name, plan=run.plan, recipe=recipe)))
    assert matter["datasets"] == ["DKYoon/SlimPajama-6B"]


def test_hostile_names_break_neither_yaml_nor_table(tmp_path):
    found = results(name="evil: [x]\n---\n# |")
    text = model_card(
        Run(tmp_path, "a|b\n---", plan=plan(spec="x | y <b>"), results=found, recipe="a: 1\n```\nnot: closed")
    )
    assert isinstance(read_front_matter(text), dict)
    assert "<b>" not in text.split("---\n", 2)[2]
    assert "````yaml" in text


def test_cards_of_others_that_cannot_be_read_give_nothing():
    assert read_front_matter("# no front matter") == {}
    assert read_front_matter("---\n[unclosed\n---\n") == {}
    assert read_front_matter("---\n- a list\n---\n") == {}
    assert read_front_matter("---\r\nlicense: mit\r\n---\r\ntext") == {"license": "mit"}


def test_small_helpers():
    assert slug("my corpus/valid (1).txt") == "my-corpus-valid-1-.txt"
    assert escape_markdown("a | b\n<c>") == r"a \| b &lt;c\>"


def test_the_card_is_written_beside_the_weights(tmp_path):
    out = write_run(tmp_path / "run")
    path = write_card(out, title="Small")
    assert path == out / "README.md"
    matter = path.read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(matter)["model-index"][0]["name"] == "Small"
