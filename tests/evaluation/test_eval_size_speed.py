import pytest
from samples import tiny
from tiny import tiny_model

from llm_streamline.evaluation import speed
from llm_streamline.evaluation.size import kv_bytes_per_token, model_size
from llm_streamline.evaluation.speed import SpeedSetup, Timings, compare_speed, speed_result, time_in_turns
from llm_streamline.runtime import PeakMemory
from llm_streamline.surgery import keep_layers


def test_size_by_the_formula():
    d, layers, inner, vocab, kv_width, head = 32, 8, 48, 272, 16, 32
    attention = d * head * 2 + d * kv_width * 2
    layer = attention + 3 * d * inner + 2 * d
    found = model_size(tiny())
    assert found.num_layers == layers
    assert found.layer_parameters == layers * layer
    assert found.embedding_parameters == 2 * vocab * d
    assert found.parameters == layers * layer + 2 * vocab * d + d
    assert found.non_embedding_parameters == found.parameters - found.embedding_parameters
    assert found.weight_bytes == 4 * found.parameters
    assert found.kv_bytes_per_token == layers * 2 * kv_width * 4  # grouped heads: half of the query width
    assert found.dtype == "float32"


def test_tied_embeddings_count_once():
    found = model_size(tiny("llama_tied_bias"))
    assert found.embedding_parameters == 272 * 32


@pytest.mark.parametrize(
    ("name", "per_layer"), [("gemma2", 2 * 2 * 16), ("gpt2", 2 * 32), ("falcon", 2 * 8), ("mamba", 0)]
)
def test_cache_of_other_families(name, per_layer):
    assert kv_bytes_per_token(tiny_model(name)) == 8 * per_layer * 4


def test_removing_layers_shows_in_the_size():
    model = tiny()
    before = model_size(model)
    keep_layers(model, [0, 1, 2, 6, 7])
    after = model_size(model)
    assert after.layer_parameters * 8 == before.layer_parameters * 5
    assert after.kv_bytes_per_token * 8 == before.kv_bytes_per_token * 5


def test_ratios_of_given_times():
    size = model_size(tiny())
    smaller = size.model_copy(update={"layer_parameters": size.layer_parameters // 2})
    original = Timings(prefill=[2.0, 4.0, 6.0], decode=[0.3, 0.3, 0.3])
    model = Timings(prefill=[1.0, 2.5, 2.0], decode=[0.3, 0.3, 0.3])
    found = compare_speed(original, model, size, smaller)
    assert found.prefill.ratio == 2.0  # of 2.0, 1.6, 3.0
    assert (found.prefill.low, found.prefill.high) == pytest.approx((1.8, 2.5))
    assert found.prefill.ideal_ratio == 2.0
    assert found.prefill.share_of_ideal == pytest.approx(1.0)
    assert found.decode.share_of_ideal == 0
    assert compare_speed(original, original, size, size).decode.share_of_ideal is None
    setup = SpeedSetup(batch_size=2, prompt_tokens=100, new_tokens=4, rounds=3)
    alone = speed_result(model, setup)
    assert (alone.prefill_seconds, alone.prefill_tokens_per_second) == (2.0, 100.0)
    assert alone.decode_tokens_per_second == pytest.approx(2 / 0.3)


def test_a_model_of_half_the_layers_is_faster():
    small, large = tiny(num_hidden_layers=2), tiny(num_hidden_layers=24)
    setup = SpeedSetup(prompt_tokens=32, new_tokens=4, rounds=5)
    timings = time_in_turns([large, small], setup)
    assert all(len(one.prefill) == len(one.decode) == 5 for one in timings)
    found = compare_speed(timings[0], timings[1], model_size(large), model_size(small))
    assert found.prefill.ratio > 2
    assert found.decode.ratio > 2
    assert timings[0].peak_memory_bytes > 0


def test_peak_memory_is_the_models_own(monkeypatch):
    """The other model is in memory, too: only what a run adds to it counts, and the model's own weights."""
    small, large = tiny(num_hidden_layers=2), tiny(num_hidden_layers=8)
    monkeypatch.setattr(speed, "reset_peak_memory", lambda: True)
    monkeypatch.setattr(speed, "current_memory_bytes", lambda: 10**9)
    added = iter((70, 40, 30, 60))  # turns: large, small; small, large
    monkeypatch.setattr(speed, "peak_memory", lambda: PeakMemory(host_bytes=10**9 + next(added), device_bytes=0))
    setup = SpeedSetup(prompt_tokens=4, new_tokens=1, rounds=2)
    found = time_in_turns([large, small], setup)
    assert found[0].peak_memory_bytes == model_size(large).weight_bytes + 70
    assert found[1].peak_memory_bytes == model_size(small).weight_bytes + 40
    monkeypatch.setattr(speed, "reset_peak_memory", lambda: False)  # the peak would be of the process since its start
    assert time_in_turns([small], setup)[0].peak_memory_bytes is None


@pytest.mark.parametrize("name", ["mamba", "lfm2", "bloom", "gemma2"])
def test_every_kind_of_cache_can_be_timed(name):
    (timings,) = time_in_turns([tiny_model(name)], SpeedSetup(prompt_tokens=4, new_tokens=2, rounds=1))
    assert timings.decode[0] > 0
