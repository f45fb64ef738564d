"""Limits of memory: read, kept, and refused in one sentence that says what would do."""

import re

import pytest
import torch
from folders import tiny_folder

from llm_streamline.config import Recipe, load_recipe
from llm_streamline.errors import ConfigError
from llm_streamline.estimates import budget
from llm_streamline.estimates.budget import ALL_WORK, ModelBytes, fit, memory_limit
from llm_streamline.sizes import as_size, parse_size
from llm_streamline.sources import resolve_model

WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
MIB = 2**20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return resolve_model(tiny_folder(tmp_path_factory.mktemp("budget"), **WIDE))


def recipe(**overrides) -> Recipe:
    return load_recipe(None, {"text.seq_len": 32, "target.layers": 1, **overrides})


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 2**32), ("1.5 GiB", 3 * 2**29), ("512mib", 2**29), ("6GB", 6 * 10**9), ("1kb", 1000)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4", "GiB", "-4GiB", "0GiB", "4 apples", "", "inf GiB", "4Gi"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="4GiB"):
        load_recipe(None, {"max_memory": text})


def test_a_size_in_words_can_be_read_again_and_is_no_less_when_rounded_up():
    for size in (123 * MIB + 1, 2**30 + 1, 7 * 2**30 + 12345):
        assert parse_size(as_size(size, up=True)) >= size
        assert abs(parse_size(as_size(size)) - size) < 0.06 * size


def test_no_limit_fits_nothing(source):
    assert fit(source, recipe(), ALL_WORK) is None


def test_auto_stays_below_what_is_free(monkeypatch):
    monkeypatch.setattr(budget, "available_bytes", lambda device: 1000 * MIB)
    monkeypatch.setattr(budget, "own_memory_bytes", lambda: 100 * MIB)
    assert memory_limit("auto", "cpu") == 900 * MIB


def test_sizes_of_a_model_equal_those_of_its_parameters(source):
    from llm_streamline.arch import get_layers
    from llm_streamline.sources import load_model

    model = load_model(source).model
    found = ModelBytes.of(source, "auto", "cpu")
    layers = [sum(p.numel() for p in layer.parameters()) for layer in get_layers(model)]
    assert found.layer == 4 * max(layers)
    assert found.rest == 4 * (sum(p.numel() for p in model.parameters()) - sum(layers))
    assert found.mapped, "float32 run as float32 on the CPU needs no copy"
    assert not ModelBytes.of(source, "bfloat16", "cpu").mapped


def test_more_memory_gives_larger_batches_within_the_limit(source):
    sizes = []
    for extra in (4, 8, 16):
        fitted = fit(source, recipe(max_memory=f"{100 + extra}MiB"), ("measure",), base=90 * MIB)
        assert fitted.peak <= fitted.limit
        sizes.append(fitted.recipe.calibration.batch_tokens)
    assert sizes == sorted(set(sizes))


def test_a_limit_below_embedding_layer_and_window_is_refused_with_one_that_would_do(source):
    with pytest.raises(ConfigError, match=r"one layer .* would do") as refusal:
        fit(source, recipe(max_memory="91MiB"), ("measure",), base=90 * MIB)
    would_do = re.search(r"--max-memory (\S+) would do", str(refusal.value))[1]
    assert fit(source, recipe(max_memory=would_do), ("measure",), base=90 * MIB).limit == parse_size(would_do)


def test_an_objective_that_does_not_fit_is_refused_with_ways_that_do(source):
    wish = {"replacement.init": "first", "selection.verify": 0, "training.per_device_train_batch_size": 16}
    kl = recipe(max_memory="98MiB", **wish, **{"training.objective": {"kl": 1.0}})
    with pytest.raises(ConfigError, match="training by kl") as refusal:
        fit(source, kl, ALL_WORK, base=80 * MIB)
    assert "--objective mse" in str(refusal.value)
    fit(source, recipe(max_memory="98MiB", **wish, **{"training.objective": {"mse": 1.0}}), ALL_WORK, base=80 * MIB)
    windows, steps = map(
        int, re.findall(r"batch_size (\d+) with gradient_accumulation_steps (\d+)", str(refusal.value))[0]
    )
    smaller = kl.training.model_copy(
        update={"per_device_train_batch_size": windows, "gradient_accumulation_steps": steps}
    )
    assert windows * steps >= 16
    fit(source, kl.model_copy(update={"training": smaller}), ALL_WORK, base=80 * MIB)


@pytest.mark.parametrize("trainable", ["above", "lora", "full"])
def test_training_the_originals_own_weights_is_refused_within_a_limit(source, trainable):
    wished = recipe(max_memory="8GiB", **{"training.trainable": trainable})
    with pytest.raises(ConfigError, match=f"training.trainable: {trainable} .*leave one of the two out"):
        fit(source, wished, ALL_WORK)
    assert fit(source, wished, ("measure",)) is not None  # an analysis trains nothing


def test_own_memory_counts_what_a_tensor_takes_and_no_mapped_file(tmp_path):
    from safetensors.torch import load_file, save_file

    from llm_streamline.runtime import own_memory_bytes

    save_file({"a": torch.ones(8 * MIB)}, tmp_path / "a.safetensors")
    before = own_memory_bytes()
    mapped = load_file(tmp_path / "a.safetensors")["a"]
    float(mapped.sum())
    assert own_memory_bytes() - before < 8 * MIB
    copied = mapped.clone()
    assert own_memory_bytes() - before > 30 * MIB
    del copied
