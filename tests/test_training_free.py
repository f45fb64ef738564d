"""Methods that train nothing, run whole: compressed, saved, proven by a reload, as their recipes say."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import tiny_folder

from llm_streamline import proof
from llm_streamline.config import load_recipe
from llm_streamline.pipeline import compress
from llm_streamline.reload import answer

RECIPES = Path(__file__).parent.parent / "recipes"
SENTENCE = "the quick brown fox jumps over a lazy dog while seven wise owls watch from an old oak tree"
SMALL = {
    "target.layers": 2,
    "text.seq_len": 32,
    "calibration.tokens": 256,
    "calibration.batch_tokens": 128,
    "selection.verify_tokens": 128,
    "replacement.fit_tokens": 512,
    "training.validation_tokens": 128,
    "evaluation.limit": 4,
    "evaluation.tokens": 2048,
    "evaluation.tasks": [],
    "evaluation.speed": False,
    "evaluation.max_new_tokens": 4,
    "evaluation.bootstrap": 20,
    "evaluation.samples": 0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training-free")
    words = SENTENCE.split()
    passages = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 40)) + f" number {i}." for i in range(200)]
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": passage}) + "\n" for passage in passages)
    tiny_folder(folder / "model", num_hidden_layers=6)
    return folder


@pytest.fixture(autouse=True)
def _proof_in_this_process(monkeypatch):
    def answer_here(command, **_):
        answer(Path(command[-1]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(proof.subprocess, "run", answer_here)


def run(place, name, **more):
    settings = {**SMALL, "text.sources": [str(place / "text.jsonl")], **more}
    return compress(str(place / "model"), place / name, load_recipe(RECIPES / f"{name}.yaml", settings))


def test_laco(place):
    outcome = run(place, "laco", **{"selection.options.interval": 1, "selection.options.combine": 3})
    assert outcome.proof.ok
    assert [edit.kind for edit in outcome.plan.edits] == ["merge"] * len(outcome.plan.edits)
    assert outcome.plan.num_layers_after == 4
    assert "merged into one" in (place / "laco" / "README.md").read_text()


def test_attention_drop(place):
    outcome = run(place, "attention-drop")
    assert outcome.proof.ok
    assert {edit.kind for edit in outcome.plan.edits} == {"silence"}
    assert outcome.plan.num_layers_after == 6
    assert "lost attention" in (place / "attention-drop" / "README.md").read_text()
    page = (place / "attention-drop" / "streamline" / "report.html").read_text()
    assert re.search("lost (its|their) attention", page)


def test_sleb(place):
    outcome = run(place, "sleb")
    assert outcome.proof.ok
    assert outcome.plan.num_layers_after == 4
    assert outcome.plan.selection.cost > 0
    assert "forward passes over the calibration text" in (place / "sleb" / "streamline" / "report.html").read_text()
