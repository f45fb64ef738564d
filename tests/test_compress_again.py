"""Checkpoints of ours as sources: cut once more, with and without an MLP that an earlier run put in a layer's place."""

import json

import pytest
import torch
from folders import byte_tokenizer
from plans import facts_of, replace
from tiny import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from llm_streamline.arch import get_layers
from llm_streamline.checkpoint import save_checkpoint
from llm_streamline.export.stream import stream_plan
from llm_streamline.layer_config import CODE_KEY, MAP_KEY
from llm_streamline.plan import Plan, Remove
from llm_streamline.replacements.build import build_replacements, install_plan
from llm_streamline.replacements.mlp_layer import MlpLayer
from llm_streamline.replacements.ship import shipped_files
from llm_streamline.replacements.starts import quick_start
from llm_streamline.sources import load_model, resolve_model
from llm_streamline.surgery import shared_view


def logits_of(model):
    with torch.no_grad():
        return model(tiny_tokens(), use_cache=False).logits


def compressed(model, out, *edits):
    """Edit `model` and save it as `compress` does; networks start from the seed."""
    plan = Plan(model=facts_of(model), edits=edits)
    networks = build_replacements(model, plan)
    for network in networks:
        quick_start(network, model, 0)
    install_plan(model, plan, networks)
    save_checkpoint(model, byte_tokenizer(), out, extra_files=shipped_files(model))
    return model


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """8 layers, of which [2, 4) became the paper's FFN without residual: 7 layers, the MLP at 2, code shipped."""
    out = tmp_path_factory.mktemp("first") / "out"
    model = tiny_model("llama", vocab_size=272)
    compressed(model, out, replace(2, 4, "ffn", residual=False, init="random"))
    return out


def test_the_first_result_ships_code_and_is_read_without_running_it(first):
    config = json.loads((first / "config.json").read_text())
    assert list(config[CODE_KEY]) == ["2"]
    assert (first / "modeling_streamline.py").is_file()
    (first / "modeling_streamline.py").rename(first / "kept.txt")
    try:
        loaded = load_model(resolve_model(first))
    finally:
        (first / "kept.txt").rename(first / "modeling_streamline.py")
    assert isinstance(get_layers(loaded.model)[2], MlpLayer)


@pytest.mark.parametrize(
    ("edits", "place"),
    [
        ((Remove(start=4, stop=6),), "2"),
        ((Remove(start=0, stop=1),), "1"),
        ((Remove(start=2, stop=3),), None),
        ((replace(3, 6),), "2"),
        ((replace(1, 4),), None),
        ((replace(3, 5, "ffn", residual=False, init="random"),), "2"),
    ],
    ids=["after", "before", "the MLP itself", "layer after", "layer over it", "a second MLP"],
)
def test_a_result_with_an_mlp_layer_is_compressed_again(edits, place, first, tmp_path):
    model = load_model(resolve_model(first)).model
    if all(isinstance(edit, Remove) for edit in edits):
        expected = logits_of(shared_view(model, Plan(model=facts_of(model), edits=edits).layer_sources()))
        torch.testing.assert_close(logits_of(compressed(model, tmp_path / "out", *edits)), expected)
    else:
        compressed(model, tmp_path / "out", *edits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if place is None:
        assert CODE_KEY not in config
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert "auto_map" not in config
        assert not (tmp_path / "out" / "modeling_streamline.py").exists()
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values())
        again.eval()
    else:
        assert place in config[CODE_KEY]
        again = load_model(resolve_model(tmp_path / "out")).model
        assert isinstance(get_layers(again)[int(place)], MlpLayer)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        torch.testing.assert_close(logits_of(theirs), logits_of(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("span", [(4, 6), (0, 1), (2, 3)])
def test_such_a_result_is_cut_on_its_files_too(span, first, tmp_path):
    edits = (Remove(start=span[0], stop=span[1]),)
    source = resolve_model(first)
    model = load_model(source).model
    plan = Plan(model=facts_of(model), edits=edits)
    out = stream_plan(source, plan, tmp_path / "out")
    compressed(model, tmp_path / "memory", *edits)
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "memory").iterdir() if path.is_file()}
    assert all((out / name).read_bytes() == (tmp_path / "memory" / name).read_bytes() for name in names)


def test_a_span_that_begins_with_the_mlp_becomes_a_copy_of_it(first, tmp_path):
    model = load_model(resolve_model(first)).model
    compressed(model, tmp_path / "out", replace(2, 5))
    again = load_model(resolve_model(tmp_path / "out")).model
    assert isinstance(get_layers(again)[2], MlpLayer)
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("cut", "place"), [((0, 1), "0"), ((4, 5), "1"), ((1, 2), None)])
def test_a_result_with_a_map_behind_a_layer_is_cut_again(cut, place, tmp_path):
    """A patch that stands behind layer 1 goes with that layer."""
    model = compressed(tiny_model("llama", vocab_size=272), tmp_path / "one", replace(2, 4, "patch", init="random"))
    assert list(getattr(model.config, MAP_KEY)) == ["1"]
    model = load_model(resolve_model(tmp_path / "one")).model
    expected = logits_of(shared_view(model, [i for i in range(6) if i != cut[0]]))
    compressed(model, tmp_path / "two", Remove(start=cut[0], stop=cut[1]))
    torch.testing.assert_close(logits_of(model), expected)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert list(config.get(MAP_KEY, ())) == ([place] if place else [])
    again = load_model(resolve_model(tmp_path / "two")).model
    torch.testing.assert_close(logits_of(again), expected, atol=1e-5, rtol=0)


def test_a_stock_result_is_an_ordinary_source(tmp_path):
    model = compressed(tiny_model("gemma3_text", vocab_size=272), tmp_path / "one", Remove(start=1, stop=3))
    kinds = list(model.config.layer_types)
    model = load_model(resolve_model(tmp_path / "one")).model
    compressed(model, tmp_path / "two", Remove(start=0, stop=1), Remove(start=4, stop=5))
    again = load_model(resolve_model(tmp_path / "two")).model
    assert again.config.layer_types == [kinds[i] for i in (1, 2, 3, 5)]
    torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=0)
