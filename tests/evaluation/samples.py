"""What the tests of the evaluation share: tiny models with a byte tokenizer, and made-up questions and texts."""

import json
import random
from pathlib import Path

import torch
from folders import byte_tokenizer
from tiny import tiny_model

from llm_streamline.sources import LoadedModel, ModelSource

POSITIONS = 512
_WORDS = (
    "river",
    "stone",
    "lamp",
    "bread",
    "bird",
    "map",
    "letter",
    "harbour",
    "ship",
    "salt",
    "paper",
    "glass",
    "iron",
)


def tiny(name: str = "llama", *, seed: int = 0, **overrides):
    """A tiny model whose vocabulary fits the byte tokenizer."""
    return tiny_model(name, seed=seed, vocab_size=272, max_position_embeddings=POSITIONS, **overrides)


def loaded(spec: str = "tiny", *, seed: int = 0, **overrides) -> LoadedModel:
    """A tiny model as `load_model` would give it."""
    source = ModelSource(spec=spec, kind="folder", path=Path(spec), revision=None, fingerprint=f"fingerprint-{seed}")
    return LoadedModel(tiny(seed=seed, **overrides), byte_tokenizer(), source, torch.float32, torch.device("cpu"))


def prose(num_words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(_WORDS) for _ in range(num_words))


def questions(count: int = 6, num_choices: int = 4) -> list[dict]:
    """Questions with contexts and choices of many lengths."""
    draw = random.Random(1)
    rows = []
    for number in range(count):
        choices = [f" {prose(draw.randint(1, 4), seed=100 * number + i)} {i}" for i in range(num_choices)]
        context = f"Question: {prose(draw.randint(2, 9), seed=number)}?\nAnswer:"
        rows.append({"id": f"q{number}", "context": context, "choices": choices, "gold": number % num_choices})
    return rows


def two_contexts(count: int = 4) -> list[dict]:
    """Questions in the form of WinoGrande: the contexts differ, the continuation is shared."""
    return [
        {
            "id": f"w{number}",
            "contexts": [f"{prose(4, number)} because Ann", f"{prose(4, number)} because Robert"],
            "continuation": f" {prose(3, number + 50)}.",
            "gold": number % 2,
        }
        for number in range(count)
    ]


def pairs(count: int = 4) -> list[dict]:
    """Sentence pairs in the form of BLiMP: no context, the first is right."""
    return [
        {
            "id": f"b{number}",
            "context": "",
            "choices": [f" The {prose(3, number)}.", f" The {prose(4, number + 9)}."],
            "gold": 0,
            "subtask": "even" if number % 2 == 0 else "odd",
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
