"""The forecast of a run within a limit: each part of the work counts, in the unit that it is done in."""

import pytest
from folders import tiny_folder

from llm_streamline.config import Recipe, load_recipe
from llm_streamline.estimates.budget import ALL_WORK, fit
from llm_streamline.estimates.forecast import Rates, announce, measure_rates, stage_seconds
from llm_streamline.estimates.saving import DiskRates
from llm_streamline.sources import load_model, resolve_model

LAYERS, WIDTH, INNER, WORDS = 4, 64, 256, 128
RATES = Rates(
    layer_seconds=1e-3, read_bytes_per_second=1e15, step_seconds=0.5, double_flops=1e6, disk=DiskRates(1e9, 1e9)
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return resolve_model(tiny_folder(folder, **sizes))


def recipe(**overrides) -> Recipe:
    asked = {
        "max_memory": "8GiB",
        "text.seq_len": 32,
        "target.layers": 1,
        "selection.span": [1, 3],
        "training.objective": {"mse": 1.0},
        "evaluation.tokens": 64,
        "evaluation.limit": 2,
        "evaluation.generation": False,
        "evaluation.speed": False,
        "replacement.init": "first",
        **overrides,
    }
    return load_recipe(None, asked)


def seconds(source, **overrides) -> dict[str, float]:
    wanted = recipe(**overrides)
    return stage_seconds(fit(source, wanted, ALL_WORK), RATES, wanted, ALL_WORK)


def both(source) -> float:
    """Layers of the original and of the result, and their heads in units of a layer."""
    model = fit(source, recipe(), ALL_WORK).model
    return LAYERS + (LAYERS - 1) + 2 * model.vocabulary * model.width / model.layer_parameters


def test_an_evaluation_is_its_texts_its_questions_and_what_is_written(source):
    plain = seconds(source)["evaluate"]
    longer = seconds(source, **{"evaluation.tokens": 128})["evaluate"]
    assert longer - plain == pytest.approx(64 * both(source) * RATES.layer_seconds)
    second_text = seconds(source, **{"evaluation.perplexity": ["news.txt"]})["evaluate"]
    assert second_text - plain == pytest.approx(longer - plain)
    more_items = seconds(source, **{"evaluation.limit": 4})["evaluate"]
    more_tasks = seconds(source, **{"evaluation.tasks": ["a.jsonl", "b.jsonl"]})["evaluate"]
    assert more_items == pytest.approx(more_tasks)
    assert more_items > plain
    writing = {"evaluation.generation": True, "evaluation.max_new_tokens": 8, "evaluation.samples": 2}
    assert seconds(source, **writing)["evaluate"] - plain == pytest.approx(8 * 3 * both(source) * RATES.step_seconds)


def test_a_closed_form_is_solved_in_float64(source):
    copied = seconds(source).get("start", 0.0)
    solved = seconds(source, **{"replacement.init": "closed_form", "replacement.fit_tokens": 64})["start"]
    states = 64 * (3 + 1) * RATES.layer_seconds  # the original to the end of the span, the network
    flops = 2 * 64 * INNER * (INNER + WIDTH) + INNER**3 / 3 + 4 * INNER**2 * WIDTH
    assert copied == 0
    assert solved == pytest.approx(states + flops / RATES.double_flops)
    narrow = {"replacement.kind": "linear", "replacement.init": "closed_form", "replacement.fit_tokens": 64}
    assert seconds(source, **narrow)["start"] < solved  # its input is the stream, not the MLP's inner state


def test_stages_that_do_not_run_take_no_time(source):
    wanted = recipe(**{"replacement.init": "best", "evaluation.generation": True})
    assert set(stage_seconds(fit(source, wanted, ALL_WORK), RATES, wanted, ("measure",))) == {"measure"}


def test_the_rates_of_this_machine_are_measured_and_said(source, caplog):
    loaded = load_model(source, "auto", "cpu")
    rates = measure_rates(loaded)
    assert min(rates.layer_seconds, rates.read_bytes_per_second, rates.step_seconds) > 0
    assert rates.double_flops > 1e6
    with caplog.at_level("INFO", logger="llm_streamline"):
        found = announce(loaded, fit(source, recipe(), ALL_WORK), ALL_WORK)
    assert set(found) >= {"measure", "train", "save", "evaluate"}
    assert "of own memory, about" in caplog.text
