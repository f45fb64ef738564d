"""Several spans, each with a network of its own, from the choice to the proven checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import tiny_folder
from test_training_free import SENTENCE, SMALL
from transformers import AutoModelForCausalLM

from llm_streamline import proof
from llm_streamline.arch import find_arch, get_layers, silence
from llm_streamline.config import load_recipe
from llm_streamline.pipeline import compress
from llm_streamline.reload import answer

RECIPE = Path(__file__).parent.parent / "recipes" / "multi-span.yaml"


@pytest.fixture(autouse=True)
def _proof_in_this_process(monkeypatch):
    def answer_here(command, **_):
        answer(Path(command[-1]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(proof.subprocess, "run", answer_here)


def test_two_stretches_are_replaced_trained_and_proven(tmp_path):
    words = SENTENCE.split()
    passages = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 40)) + f" number {i}." for i in range(200)]
    with (tmp_path / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": passage}) + "\n" for passage in passages)
    folder = tiny_folder(tmp_path / "model", num_hidden_layers=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in (1, 2, 5, 6):  # two stretches that a single layer each stands in for without any loss
        silence(get_layers(model)[layer], find_arch(model))
    model.save_pretrained(folder)
    settings = {
        **SMALL,
        "text.sources": [str(tmp_path / "text.jsonl")],
        "selection.options": {"max_spans": 2},
        "selection.verify": 0,  # a random model may lose layers and get better, so its loss is no judge
        "training.tokens": 512,
        "training.per_device_train_batch_size": 2,
        "training.num_evals": 1,
    }
    outcome = compress(str(folder), tmp_path / "out", load_recipe(RECIPE, settings))
    assert outcome.proof.ok
    assert [(edit.kind, edit.start, edit.stop) for edit in outcome.plan.edits] == [
        ("replace", 1, 3),
        ("replace", 5, 7),
    ]
    assert outcome.plan.num_layers_after == 6
    assert outcome.plan.selection.convention == "net: 4 layers leave in 2 spans, 2 come back, 6 remain"
    starts = json.loads((tmp_path / "out" / "streamline" / "training.json").read_text())["starts"]
    assert {name.partition(":")[0] for name in starts} == {"0", "1"}
    page = (tmp_path / "out" / "streamline" / "report.html").read_text()
    assert "layers 1–2, layers 5–6" in page
