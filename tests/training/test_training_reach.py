"""What `training.trainable: auto` stands for: a truth table, each line for a reason of its own."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from llm_streamline import ranks
from llm_streamline.config import load_recipe
from llm_streamline.training import reach

PLENTY = 2**40


def settled(monkeypatch, memory=PLENTY, has_network=True, **wishes):
    monkeypatch.setattr(reach, "total_bytes", lambda device: memory)
    loaded = SimpleNamespace(model=tiny_model(), device=torch.device("cpu"))
    return reach.settle_reach(load_recipe(None, wishes), loaded, has_network).training.trainable


def test_above_is_trained_where_there_is_memory(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert settled(monkeypatch) == "above"
    assert "--trainable replacement" in caplog.text


def test_the_memory_it_takes_is_that_of_weights_copies_gradients_and_moments(monkeypatch):
    model = tiny_model()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    need = 4 * sum(p.numel() for p in model.parameters()) + 16 * layers  # float32 weights, half of the memory at most
    assert settled(monkeypatch, 2 * need) == "above"
    assert settled(monkeypatch, 2 * need - 1) == "replacement"


@pytest.mark.parametrize(
    "wishes",
    [
        {"training.objective": "mse"},  # what lies above gets no gradient
        {"max_memory": "16GiB"},
        {"quantization": "4bit"},
    ],
)
def test_the_replacement_alone_where_more_cannot_be(monkeypatch, wishes):
    assert settled(monkeypatch, **wishes) == "replacement"


def test_an_original_that_is_shared_out_stays_as_it_is(monkeypatch):
    """Every rank knows that it will be; rank 0 must not forget it while it decides for all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_sharding", True)

    def from_main(make):  # what other ranks would be told
        with ranks._alone():
            return make()

    monkeypatch.setattr(ranks, "from_main", from_main)
    assert settled(monkeypatch) == "replacement"


def test_without_a_network_nothing_is_trained(monkeypatch):
    assert settled(monkeypatch, has_network=False) == "replacement"


@pytest.mark.parametrize("named", ["replacement", "lora", "full"])
def test_what_the_user_names_stays(monkeypatch, named):
    assert settled(monkeypatch, memory=0, **{"training.trainable": named}) == named
