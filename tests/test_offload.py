"""Layers on disk: the same bits as layers in memory, for every family, and nothing left behind."""

import gc
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from tiny import TINY_ROWS, tiny_model, tiny_tokens

from llm_streamline.arch import get_layers
from llm_streamline.data.windows import Windows
from llm_streamline.measure.partial import run_tapped
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe
from llm_streamline.offload import bring_home, is_streamed, own_copy, weights_in_memory
from llm_streamline.sources import load_model, resolve_model


def both(folder: Path, dtype: str = "auto"):
    """The model in memory and the same with its layers on disk."""
    source = resolve_model(folder)
    return [load_model(source, dtype, with_tokenizer=False, layers_on_disk=on_disk).model for on_disk in (False, True)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("offload") / "model", num_hidden_layers=6, shards=True)


def on_meta(module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("name", TINY_ROWS)
def test_layers_on_disk_give_the_same_bits(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    whole, streamed = both(tmp_path)
    with torch.inference_mode():
        expected = whole(tiny_tokens(), use_cache=False).logits
        assert torch.equal(streamed(tiny_tokens(), use_cache=False).logits, expected)
    assert is_streamed(streamed)
    assert not is_streamed(whole)
    assert all(on_meta(layer) for layer in get_layers(streamed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_the_same_bits_in_any_dtype(llama, dtype):
    windows = Windows(input_ids=tiny_tokens(4, 16).to(torch.int32))
    sums = []
    for model in both(llama, dtype):
        sums.append(CosineStats(6))
        observe(model, windows, sums[-1], 32, "test")
    for mine, theirs in zip(sums[0].tensors().values(), sums[1].tensors().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_forward_that_stops_early_leaves_no_weights_behind(llama):
    whole, streamed = both(llama)
    inputs = {"input_ids": tiny_tokens()}
    with torch.inference_mode():
        states, logits = run_tapped(streamed, inputs, [1], stop=3)
        assert logits is None
        assert torch.equal(states[3], run_tapped(whole, inputs, stop=3)[0][3])
    assert all(on_meta(layer) for layer in get_layers(streamed))


def test_greedy_generation_with_cache_is_the_same(llama):
    whole, streamed = both(llama)
    texts = [m.generate(tiny_tokens(), max_new_tokens=6, do_sample=False) for m in (whole, streamed)]
    assert torch.equal(*texts)


def test_a_gradient_flows_through_layers_on_disk(llama):
    gradients = []
    for model in both(llama):
        embedded = model.get_input_embeddings()(tiny_tokens()).detach().requires_grad_(True)
        model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)


def test_an_own_copy_has_weights_and_no_hook(llama):
    whole, streamed = both(llama)
    copied, expected = own_copy(get_layers(streamed)[2]), get_layers(whole)[2]
    assert not is_streamed(copied)
    for mine, theirs in zip(copied.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert on_meta(get_layers(streamed)[2]), "the original is on disk again"
    with torch.no_grad():
        next(copied.parameters()).zero_()
    with weights_in_memory(get_layers(streamed)[2]) as layer:
        assert torch.equal(next(layer.parameters()), next(expected.parameters())), "the copy is the caller's own"


def test_a_layer_brought_home_may_be_changed_and_the_file_stays(llama):
    _, streamed = both(llama)
    before = {path.name: path.read_bytes() for path in llama.glob("*.safetensors")}
    layer = get_layers(streamed)[1]
    bring_home(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        streamed(tiny_tokens(), use_cache=False)
    assert not is_streamed(layer)
    assert is_streamed(streamed)
    assert all(not parameter.any() for parameter in layer.parameters())
    assert before == {path.name: path.read_bytes() for path in llama.glob("*.safetensors")}


def test_weights_fused_while_loading_go_to_a_temporary_folder_that_is_removed(tmp_path, monkeypatch):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, streamed = both(tmp_path / "model")
    (folder,) = tmp_path.glob("llm-streamline-converted-*")
    assert any(folder.iterdir())
    del streamed
    gc.collect()
    assert not folder.exists()


def test_plain_weights_are_not_copied(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    both(llama)
    assert not list(tmp_path.iterdir())
