"""Latency as a target: known times in, right numbers of layers out; and once with a real clock."""

import pytest
from tiny import tiny_model

from llm_streamline.config import Target
from llm_streamline.errors import PlanError
from llm_streamline.evaluation import latency
from llm_streamline.evaluation.latency import confirm_latency, latency_cost
from llm_streamline.evaluation.size import kv_bytes_of_layers, kv_bytes_per_token
from llm_streamline.evaluation.speed import SpeedSetup, Timings
from llm_streamline.plan import Network
from llm_streamline.sizing import decide_size


def clock(layer, rest):
    """A machine on which a layer takes `layer` seconds and all else `rest`."""

    def timed(models, setup):
        seconds = [rest + layer * model.config.num_hidden_layers for model in models]
        return [Timings(prefill=[s] * 3, decode=[s] * 3) for s in seconds]

    return timed


def decided(model, wish, network=None):
    cost = latency_cost(model)
    target = Target(latency=wish)
    size = decide_size(target, network, [1] * 8, 10, {"latency": cost})
    return confirm_latency(model, size, network.num_layers_added if network else 0, target.latency)


def test_the_ratio_is_reached_and_one_layer_fewer_would_miss_it(monkeypatch):
    monkeypatch.setattr(latency, "time_in_turns", clock(1e-3, 2e-3))  # 10 ms; half is a ratio of 5 layers
    model = tiny_model("llama")
    found = decided(model, "0.5x")
    assert found.num_removed == 5
    assert "3 of 8 layers measured at 0.500x" in found.convention
    assert "5 of 10 ms a generated token on this machine" in found.convention
    assert decided(model, 0.51, Network(kind="layer")).num_removed == 6
    with pytest.raises(PlanError, match="at most 7 layers can go, which leaves 3 ms"):
        decided(model, 0.2)


def test_a_calculation_that_measuring_refutes_is_corrected(monkeypatch):
    """Layers that cost more at the end than in the middle: the tail that was measured first promised too much."""
    model = tiny_model("llama")
    monkeypatch.setattr(latency, "time_in_turns", clock(1e-3, 0.0))
    size = decide_size(Target(latency=0.5), None, [1] * 8, 10, {"latency": latency_cost(model)})
    assert size.num_removed == 4
    monkeypatch.setattr(latency, "time_in_turns", clock(1e-3, 2e-3))
    assert confirm_latency(model, size, 0, 0.5).num_removed == 5
    monkeypatch.setattr(latency, "time_in_turns", clock(1e-3, 1.0))
    with pytest.raises(PlanError, match="is not reached"):
        confirm_latency(model, size, 0, 0.5)


def test_a_machine_on_which_fewer_layers_are_not_faster_is_told(monkeypatch):
    monkeypatch.setattr(latency, "time_in_turns", clock(0.0, 1e-3))
    with pytest.raises(PlanError, match="latency cannot be a target"):
        latency_cost(tiny_model("llama"))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "lfm2", "deepseek_v3", "mamba", "gpt2"])
def test_families_can_be_timed_cut(name, monkeypatch):
    monkeypatch.setattr(latency, "SETUP", SpeedSetup(prompt_tokens=12, new_tokens=2, rounds=2))
    model = tiny_model(name)
    measured = latency.latency_ratio(model, latency._largest_cut(model, 3), latency.SETUP)
    assert measured.seconds[0] > 0
    assert measured.seconds[1] > 0
    assert model.config.num_hidden_layers == 8


def test_the_cache_of_a_sliding_layer_ends_at_its_window():
    model = tiny_model("gemma3_text")  # window 8; 2 heads of 16, keys and values, float32
    token = 2 * 2 * 16 * 4
    sliding = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert kv_bytes_of_layers(model) == [token] * 8
    assert kv_bytes_of_layers(model, 100) == [token * (8 if slides else 100) for slides in sliding]
    assert kv_bytes_per_token(model) == 8 * token
    assert kv_bytes_of_layers(tiny_model("mamba"), 100) == [0] * 8
