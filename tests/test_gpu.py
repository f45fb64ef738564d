"""Runs on a real GPU, for machines that have one: `pytest -m gpu`."""

import json

import pytest
import torch
from small_run import make_place, run

from llm_streamline.evaluation.result import Results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SETTINGS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "hidden states": {"training.objective": "mse", "training.trainable": "replacement"},
    "all weights": {"training.trainable": "full"},
    "compiled": {"training.torch_compile": True, "training.objective": "mse", "training.trainable": "replacement"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("gpu") / "place")


def losses(out):
    """First and last validation loss of the training, and the perplexities that the evaluation found."""
    found = json.loads((out / "streamline" / "training.json").read_text())["validation"]
    results = Results.load(out / "streamline" / "results.json")
    return [found[0]["loss"], found[-1]["loss"], *(text.nll for m in results.models for text in m.perplexity)]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_gpu_gives_the_losses_of_the_cpu(place, tmp_path, name):
    settings = {"accept_degenerate_text": True, **SETTINGS[name]}
    run(place, tmp_path / "cpu", overrides={**settings, "device": "cpu"})
    run(place, tmp_path / "gpu", overrides={**settings, "device": "cuda"})
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("device", ["cuda:1", "cuda:0,cuda:1"])
def test_several_gpus(place, tmp_path, device):
    settings = {"accept_degenerate_text": True}
    run(place, tmp_path / "cpu", overrides={**settings, "device": "cpu"})
    run(place, tmp_path / "gpu", overrides={**settings, "device": device})
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)
