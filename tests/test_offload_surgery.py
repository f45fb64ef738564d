"""Edits, starts, training and saving of a model whose layers are on disk: the same bits as with layers in memory."""

import json
from pathlib import Path

import pytest
import torch
from plans import removing, replacing, tiny_windows
from safetensors.torch import load_file
from tiny import TINY_ROWS, tiny_model, tiny_tokens

from llm_streamline.arch import get_layers
from llm_streamline.checkpoint import save_checkpoint
from llm_streamline.config import TrainingConfig
from llm_streamline.errors import ArchitectureError
from llm_streamline.measure.stats import CosineStats
from llm_streamline.offload import is_streamed
from llm_streamline.replacements.build import build_replacements, install_plan
from llm_streamline.replacements.ship import shipped_files
from llm_streamline.replacements.starts import available_starts, quick_start, set_start
from llm_streamline.sources import load_model, resolve_model
from llm_streamline.training.begin import StartSettings, begin
from llm_streamline.training.student import Student


def both(name: str, folder: Path):
    """The same model loaded whole and with its layers on disk."""
    tiny_model(name).save_pretrained(folder)
    source = resolve_model(folder)
    return [load_model(source, with_tokenizer=False, layers_on_disk=on_disk).model for on_disk in (False, True)]


def saved(model, plan, out: Path, start: str | None = None, **options) -> Path:
    replacements = build_replacements(model, plan)
    for replacement in replacements:
        quick_start(replacement, model, 0) if start is None else set_start(replacement, model, start, 0)
    install_plan(model, plan, replacements)
    return save_checkpoint(model, None, out, extra_files=shipped_files(model), **options)


def same_folders(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert names == sorted(path.name for path in other.iterdir() if path.is_file())
    for name in names:
        if name.endswith(".safetensors"):
            mine, theirs = load_file(one / name), load_file(other / name)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)
        elif name.endswith(".json"):
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes()
    return True


@pytest.mark.parametrize("name", [*TINY_ROWS])
def test_removing_layers_saves_the_same_files(name, tmp_path):
    whole, streamed = both(name, tmp_path / "model")
    plan = removing(whole, 4, 6)
    try:
        expected = saved(whole, plan, tmp_path / "whole")
    except ArchitectureError as problem:  # this family cannot lose these layers
        with pytest.raises(ArchitectureError, match=str(problem)[:40].replace("(", r"\(")):
            saved(streamed, plan, tmp_path / "streamed")
        return
    assert same_folders(expected, saved(streamed, plan, tmp_path / "streamed"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "opt", "llama_tied_bias", "gpt_neox"])
def test_a_layer_put_back_saves_the_same_files(name, tmp_path):
    whole, streamed = both(name, tmp_path / "model")
    plan = replacing(whole, 2, 5)
    assert same_folders(saved(whole, plan, tmp_path / "whole"), saved(streamed, plan, tmp_path / "streamed"))


@pytest.mark.parametrize("kind", ["ffn", "swiglu", "linear"])
def test_other_networks_save_the_same_files(kind, tmp_path):
    whole, streamed = both("llama", tmp_path / "model")
    plan = replacing(whole, 2, 5, kind, init="identity")
    folders = [saved(model, plan, tmp_path / name, "identity") for model, name in ((whole, "a"), (streamed, "b"))]
    assert same_folders(*folders)
    with torch.inference_mode():
        logits = [model(tiny_tokens(), use_cache=False).logits for model in (whole, streamed)]
    assert torch.equal(*logits)


def test_shards_and_their_index_are_those_of_transformers(tmp_path):
    whole, streamed = both("llama", tmp_path / "model")
    plan = removing(whole, 2, 4)
    a = saved(whole, plan, tmp_path / "whole", max_shard_size="40KB")
    b = saved(streamed, plan, tmp_path / "streamed", max_shard_size="40KB")
    index = json.loads((b / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert same_folders(a, b)


@pytest.mark.parametrize("start", ["first", "last", "average", "identity", "random"])
def test_every_start_is_the_same(start, tmp_path):
    states = []
    for model in both("llama", tmp_path):
        (replacement,) = build_replacements(model, replacing(model, 2, 5, init="first"))
        set_start(replacement, model, start, 0)
        states.append(replacement.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_best_start_is_found_and_put_back_the_same(tmp_path):
    found = []
    for model in both("llama", tmp_path):
        settings = StartSettings(ridge=0.1, fit_tokens=64, batch_tokens=32, seed=0)
        plan = replacing(model, 2, 5, init="best")
        (replacement,), losses = begin(model, plan, tiny_windows(4), tiny_windows(2, seed=1), settings)
        assert set(available_starts(replacement, model)) < set(losses)
        found.append((losses, replacement.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


@pytest.mark.parametrize("objective", ["mse", "lm", "kl"])
def test_losses_and_gradients_are_the_same(objective, tmp_path):
    results = []
    for model in both("llama", tmp_path):
        plan = replacing(model, 2, 5)
        student = Student(model, plan, build_replacements(model, plan), TrainingConfig(objective={objective: 1.0}))
        loss = student(tiny_tokens(), with_token_losses=True)
        loss["loss"].backward()
        results.append([loss["loss"], loss["token_losses"], *(p.grad for p in student.parameters())])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_after_an_edit_only_the_replaced_layer_is_in_memory(tmp_path):
    _, streamed = both("llama", tmp_path / "model")
    saved(streamed, replacing(streamed, 2, 5), tmp_path / "out")
    assert [is_streamed(layer) for layer in get_layers(streamed)] == [True, True, False, True, True, True]


def test_statistics_of_a_saved_model_can_be_taken_from_disk_again(tmp_path):
    whole, _ = both("llama", tmp_path / "model")
    out = saved(whole, replacing(whole, 2, 5), tmp_path / "out")
    again = load_model(resolve_model(out), with_tokenizer=False, layers_on_disk=True).model
    sums = [CosineStats(6) for _ in range(2)]
    from llm_streamline.measure.stream import observe

    for model, found in zip((whole, again), sums, strict=True):
        observe(model, tiny_windows(), found, 32, "test")
    assert torch.equal(sums[0].cosine_sum_rest, sums[1].cosine_sum_rest)
