"""Hidden states on disk: the same losses as without, computed once, believed only after checking."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from plans import replacing, tiny_windows
from tiny import tiny_model

from llm_streamline.config import TrainingConfig, load_recipe
from llm_streamline.errors import ConfigError, OutputError
from llm_streamline.measure.partial import run_tapped
from llm_streamline.replacements.build import build_replacements
from llm_streamline.training import states as module
from llm_streamline.training.states import CachedStates, StateRequest, cached_states, check_cacheable
from llm_streamline.training.student import Student
from llm_streamline.training.trainer import num_windows_seen, train_student

WINDOWS = tiny_windows(6)
BATCH_TOKENS = 32


def request_of(original, **changes) -> StateRequest:
    wanted = {
        "model": "tiny",
        "dtype": str(original.dtype).removeprefix("torch."),
        "windows": "0",
        "num_windows": 6,
        "seq_len": 16,
        "width": 32,
        "enters": 2,
        "leaves": (5,),
    }
    return StateRequest(**wanted | changes)


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def small_shards(monkeypatch):
    """Two windows in a shard."""
    monkeypatch.setattr(module, "_SHARD_BYTES", 2 * 2 * 16 * 32 * 4)


def forbidden(*_, **__):
    raise AssertionError("the original was run although its states are on disk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_from_the_cache_gives_the_same_losses(tmp_path, dtype, accumulation):
    config = TrainingConfig(
        tokens=12 * 16,  # each window twice
        objective={"mse": 1.0},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_evals=1,
        validation_tokens=32,
    )
    losses = []
    for cached in (False, True):
        original = tiny_model("llama").to(dtype)
        plan = replacing(original, 2, 5)
        student = Student(original, plan, build_replacements(original, plan), config)
        request = request_of(original, num_windows=num_windows_seen(config, WINDOWS))
        found = cached_states(original, WINDOWS, request, tmp_path, BATCH_TOKENS) if cached else None
        history = train_student(student, config, WINDOWS, tiny_windows(2, seed=1), tmp_path / str(cached), 0, found)
        losses.append([row["loss"] for row in history["steps"]])
    assert len(losses[0]) == 6 // accumulation
    assert losses[0] == losses[1]


def test_what_is_cached_are_the_states_of_the_original(tmp_path, model, small_shards):
    found = cached_states(model, WINDOWS, request_of(model, leaves=(4, 6)), tmp_path, BATCH_TOKENS)
    states, _ = run_tapped(model, {"input_ids": WINDOWS.input_ids.long()}, [2, 4], stop=6)
    for index in range(6):
        torch.testing.assert_close(found[index]["input"], states[2][index])
        torch.testing.assert_close(found[index]["targets"][0], states[4][index])
        torch.testing.assert_close(found[index]["targets"][1], states[6][index])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6


def test_half_precision_is_kept_as_it_is(tmp_path, model):
    found = cached_states(model.bfloat16(), WINDOWS, request_of(model.bfloat16()), tmp_path, BATCH_TOKENS)
    assert found[0]["input"].dtype == torch.bfloat16
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert size == pytest.approx(6 * 16 * 32 * 2 * 2, rel=0.05)


def test_the_same_request_runs_nothing_again(tmp_path, model, monkeypatch, small_shards):
    first = cached_states(model, WINDOWS, request_of(model), tmp_path, BATCH_TOKENS)
    monkeypatch.setattr(module, "run_tapped", forbidden)
    again = cached_states(model, WINDOWS, request_of(model), tmp_path, BATCH_TOKENS)
    assert torch.equal(first[5]["input"], again[5]["input"])
    with pytest.raises(AssertionError, match="was run"):
        cached_states(model, WINDOWS, request_of(model, enters=1), tmp_path, BATCH_TOKENS)


def test_a_killed_run_goes_on_behind_its_last_shard(tmp_path, model, monkeypatch, small_shards):
    whole = cached_states(model, WINDOWS, request_of(model), tmp_path / "whole", BATCH_TOKENS)
    write = module._write_shard

    def dies(path, tensors):
        if path.name.endswith("2.safetensors"):
            raise KeyboardInterrupt
        return write(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            cached_states(model, WINDOWS, request_of(model), tmp_path / "killed", BATCH_TOKENS)
    seen = []
    compute = module._compute
    monkeypatch.setattr(module, "_compute", lambda *a: seen.append(len(a[1])) or compute(*a))
    again = cached_states(model, WINDOWS, request_of(model), tmp_path / "killed", BATCH_TOKENS)
    assert seen == [2], "only the last two windows were left"
    assert all(torch.equal(whole[i]["targets"], again[i]["targets"]) for i in range(6))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest"])
def test_what_is_damaged_is_computed_anew(tmp_path, model, small_shards, damage):
    expected = cached_states(model, WINDOWS, request_of(model), tmp_path, BATCH_TOKENS)
    expected = [expected[i]["input"].clone() for i in range(6)]
    shard = sorted(tmp_path.rglob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-5] ^= 0xFF
        shard.unlink()
        shard.write_bytes(content)
    elif damage == "cut":
        shard.unlink()
        shard.write_bytes(content[:-8])
    elif damage == "gone":
        shard.unlink()
    else:
        next(tmp_path.rglob("manifest.json")).write_text("{")
    again = cached_states(model, WINDOWS, request_of(model), tmp_path, BATCH_TOKENS)
    assert all(torch.equal(again[i]["input"], expected[i]) for i in range(6))
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    assert len(manifest["shards"]) == 3


def test_a_disk_with_too_little_room_is_refused_before_anything_is_run(tmp_path, model, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(module, "run_tapped", forbidden)
    with pytest.raises(OutputError, match="disk is full"):
        cached_states(model, WINDOWS, request_of(model), tmp_path, BATCH_TOKENS)


def test_every_part_of_a_request_changes_its_key(model):
    plain = request_of(model)
    others = [request_of(model, **{name: 7}) for name in vars(plain) if name not in ("leaves", "dtype")]
    others += [request_of(model, leaves=(6,)), request_of(model, dtype="bfloat16")]
    assert len({plain.key, *(other.key for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("objective", [{"kl": 1.0}, {"mse": 1.0, "lm": 0.1}])
def test_objectives_that_need_more_are_refused(objective):
    with pytest.raises(ConfigError, match="--objective mse"):
        check_cacheable(objective, "replacement")
    check_cacheable({"mse": 0.5}, "replacement")
    with pytest.raises(ConfigError, match="trainable"):
        check_cacheable({"mse": 1.0}, "norms")


def test_mapped_states_are_no_memory_of_the_process(tmp_path, model, monkeypatch):
    from llm_streamline.runtime import own_memory_bytes

    windows = tiny_windows(128, 128)
    request = request_of(model, num_windows=128, seq_len=128)
    monkeypatch.setattr(module, "_SHARD_BYTES", 8 * request.window_bytes)
    cached_states(model, windows, request, tmp_path, 512)
    before = own_memory_bytes()
    again = CachedStates(tmp_path / request.key[:16], request)
    assert sum(float(again[i]["input"].sum()) for i in range(128)) != 0
    assert own_memory_bytes() - before < 0.3 * 128 * request.window_bytes


def test_the_folder_is_a_recipe_key():
    assert load_recipe(None, {"cache_states": "states"}).cache_states == "states"
