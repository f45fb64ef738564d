import json

import pytest
import torch
from plans import facts, tiny_windows
from tiny import tiny_model

from llm_streamline.errors import ConfigError
from llm_streamline.measure.files import Statistics, StatsInfo
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe


@pytest.fixture(scope="module")
def statistics():
    sums = CosineStats(8)
    observe(tiny_model(), tiny_windows(), sums, 64, "test")
    info = StatsInfo(
        model=facts(),
        dtype="float32",
        device="cpu",
        num_tokens=sums.num_tokens,
        count_first=sums.count_first,
        count_rest=sums.count_rest,
        num_windows=4,
        seq_len=16,
        batch_tokens=64,
        seconds=1.0,
        layer_seconds_per_token=1e-6,
        peak_memory_bytes=1,
        machine={},
        text={"sources": []},
    )
    return Statistics(sums, info)


def test_statistics_survive_their_files(statistics, tmp_path):
    statistics.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert loaded.info == statistics.info
    for name, tensor in statistics.sums.tensors().items():
        assert torch.equal(getattr(loaded.sums, name), tensor)
    for name in ("similarity", "similarity_first", "similarity_rest"):
        assert torch.equal(getattr(loaded, name), getattr(statistics, name))
    assert loaded.massive_layers == statistics.massive_layers


def test_the_folder_of_the_run_does_as_well(statistics, tmp_path):
    (tmp_path / "streamline").mkdir()
    statistics.save(tmp_path / "streamline")
    assert Statistics.load(tmp_path).info == statistics.info


def test_missing_statistics_name_the_command(tmp_path):
    with pytest.raises(ConfigError, match="llm-streamline analyze MODEL"):
        Statistics.load(tmp_path)


def test_statistics_without_their_sums_are_refused(statistics, tmp_path):
    statistics.save(tmp_path)
    (tmp_path / "stats.safetensors").unlink()
    with pytest.raises(ConfigError, match="analyze"):
        Statistics.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"\xff" * 40])
def test_damaged_sums_are_refused(statistics, tmp_path, content):
    statistics.save(tmp_path)
    (tmp_path / "stats.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="run analyze again"):
        Statistics.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 1, "x": 2}'])
def test_damaged_history_is_refused(statistics, tmp_path, content):
    statistics.save(tmp_path)
    (tmp_path / "stats.json").write_text(content)
    with pytest.raises(ConfigError):
        Statistics.load(tmp_path)


def test_sums_of_another_depth_are_refused(statistics, tmp_path):
    statistics.save(tmp_path)
    path = tmp_path / "stats.json"
    data = json.loads(path.read_text())
    data["model"]["num_layers"] = 5
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="of the right shape"):
        Statistics.load(tmp_path)


def test_windows_of_one_token_have_only_first_tokens():
    sums = CosineStats(8)
    observe(tiny_model(), tiny_windows(4, 1), sums, 64, "test")
    info = StatsInfo.model_construct(model=facts())
    assert torch.equal(Statistics(sums, info).similarity_rest, Statistics(sums, info).similarity)
    assert Statistics(sums, info).massive_layers == []


def test_a_planted_massive_activation_is_found():
    model = tiny_model()
    token = 11  # stands first in every window and nowhere else; layer 3 lengthens it and it alone
    windows = tiny_windows(6)
    windows.input_ids[windows.input_ids == token] = 12
    windows.input_ids[:, 0] = token

    def lengthen(_module, _args, output):
        output[:, 0] *= 300
        return output

    handle = model.model.layers[3].register_forward_hook(lengthen)
    sums = CosineStats(8)
    observe(model, windows, sums, 64, "test")
    handle.remove()
    assert Statistics(sums, StatsInfo.model_construct(model=facts())).massive_layers == [3]
