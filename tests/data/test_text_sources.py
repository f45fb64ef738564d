import json
from itertools import islice

import pytest
import torch
from texts import documents, tiny_tokenizer
from tiny import tiny_model

from llm_streamline.data import WindowNeed, check_disjoint, open_text, prepare_windows, self_text
from llm_streamline.errors import NumericsError, TextError


def test_builtin_is_prose_that_is_there_and_always_the_same():
    found = list(islice(open_text("builtin").documents(), 180))
    assert sum(len(document.text) for document in found) > 300_000
    assert found[0].source.startswith("topic")
    assert any(document.source.startswith("docstrings of") for document in found)
    assert len({document.hash for document in found}) == len(found)
    assert max(len(document.text) for document in found) < 17_000
    again = open_text("builtin").documents()
    assert list(islice(again, 180)) == found


@pytest.fixture
def hub_folder(tmp_path):
    """A local folder in the form of a Hub data set; `datasets` reads it by the same code."""
    texts = documents(60)
    for split, part in {"train": texts[:50], "test": texts[50:]}.items():
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"body": text, "n": n}) + "\n" for n, text in enumerate(part))
        (tmp_path / "set" / "data" / f"{split}-00000.jsonl").write_text(lines)
    return tmp_path / "set"


def test_a_hub_data_set_is_streamed_by_split_and_field(hub_folder):
    assert [d.text for d in open_text(f"hub:{hub_folder}#body").documents()] == documents(50)
    test = open_text(f"hub:{hub_folder}@test#body")
    assert [d.text for d in test.documents()] == documents(10, start=50)
    assert next(test.documents()).source == f"{hub_folder}: row 1"


def test_a_hub_data_set_gives_windows_and_changes_its_fingerprint_with_its_files(hub_folder, tmp_path):
    spec = f"hub:{hub_folder}#body"
    windows = prepare_windows([spec], tiny_tokenizer(), {"train": WindowNeed(320, 32)})["train"]
    assert len(windows) == 10
    before = open_text(spec).fingerprint
    assert open_text(spec).fingerprint == before
    with (hub_folder / "data" / "train-00000.jsonl").open("a") as file:
        file.write(json.dumps({"body": "one more document for the set", "n": 50}) + "\n")
    assert open_text(spec).fingerprint != before


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("", "no column 'text'; there are body, n"),
        ("@dev#body", "no split 'dev'; there are"),
        (":german#body", "cannot open the data set: BuilderConfig 'german' not found"),
        ("/nothing#body", "cannot open the data set"),
        ("#n", "field 'n' holds int"),
    ],
)
def test_a_hub_data_set_that_does_not_fit_is_one_sentence(hub_folder, tail, message):
    with pytest.raises(TextError, match=message):
        list(open_text(f"hub:{hub_folder}{tail}").documents())


@pytest.fixture
def writer():
    tokenizer = tiny_tokenizer()
    return tiny_model(
        "llama", vocab_size=len(tokenizer) + 8, num_hidden_layers=2, max_position_embeddings=40
    ), tokenizer


def first(count, spec, model, tokenizer, role="train", seed=0):
    stream = open_text(spec, model=model, tokenizer=tokenizer).records_for(role, seed)
    return [next(stream).text for _ in range(count)]


def test_a_model_writes_its_own_text_the_same_for_the_same_seed_and_role(writer):
    texts = first(20, "self", *writer)
    assert texts == first(20, "self", *writer)
    assert len(set(texts)) == 20
    assert not set(texts) & set(first(20, "self", *writer, role="calibration"))
    assert not set(texts) & set(first(20, "self", *writer, seed=1))


def test_writing_changes_neither_the_model_nor_the_global_generator(writer):
    model, tokenizer = writer
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first(3, "self", model, tokenizer)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_self_gives_windows_for_every_role(writer, bos, eos, tmp_path):
    model, _ = writer
    needs = {"calibration": WindowNeed(300, 32), "train": WindowNeed(600, 32), "validation": WindowNeed(64, 32)}
    tokenizer = tiny_tokenizer(bos, eos)
    made = prepare_windows(["self"], tokenizer, needs, model=model, folder=tmp_path)
    assert [len(windows) for windows in made.values()] == [10, 19, 2]
    check_disjoint(made["calibration"], made["train"])
    again = prepare_windows(["self"], tokenizer, needs, model=model)
    assert all(torch.equal(again[role].input_ids, made[role].input_ids) for role in needs)


def test_sampling_follows_the_models_distribution(writer, monkeypatch):
    """The first token written after the start: its counts against the model's own probabilities."""
    model, tokenizer = writer
    stream = open_text("self", model=model, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    monkeypatch.setattr(self_text, "_decode", lambda ids, stops, tokenizer: drawn.append(int(ids[0])) or "")
    monkeypatch.setattr(self_text, "MAX_NEW_TOKENS", 1)
    for _ in range(60):
        stream._write(generator, 16)
    probabilities = model(torch.tensor([[1]])).logits[0, -1, : len(tokenizer)].softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(tokenizer))
    spread = (len(drawn) * probabilities * (1 - probabilities)).sqrt()
    likely = probabilities * len(drawn) > 10
    assert likely.any()
    assert ((counts - len(drawn) * probabilities).abs()[likely] < 5 * spread[likely]).all()


def test_self_without_a_model_or_with_a_broken_one_is_one_sentence(writer):
    model, tokenizer = writer
    with pytest.raises(TextError, match="no model is loaded"):
        open_text("self")
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        first(1, "self", model, tokenizer)


def test_a_model_that_writes_nothing_is_told_from_one_that_is_slow(writer):
    model, tokenizer = writer
    model.model.norm.weight.data.zero_()  # all logits equal
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # every token ends the document
    with pytest.raises(TextError, match="wrote nothing new"):
        prepare_windows(["self"], tokenizer, {"train": WindowNeed(64, 32)}, model=model)


def test_another_model_has_another_fingerprint(writer):
    model, tokenizer = writer
    before = open_text("self", model=model, tokenizer=tokenizer).fingerprint
    assert open_text("self", model=model, tokenizer=tokenizer).fingerprint == before
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    assert open_text("self", model=model, tokenizer=tokenizer).fingerprint != before
