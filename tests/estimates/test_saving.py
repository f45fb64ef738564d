"""Time of saving and proving: parts add up, the disk is really measured, the proof's forwards are those it makes."""

import logging

import pytest
import torch
from folders import tiny_folder
from plans import replacing
from tiny import tiny_model, tiny_tokens

from llm_streamline.arch import get_layers
from llm_streamline.config import load_recipe
from llm_streamline.estimates import saving as module
from llm_streamline.estimates.budget import fit
from llm_streamline.estimates.forecast import announce, measure_rates, saving_seconds
from llm_streamline.estimates.saving import (
    STATED_DISK,
    DiskRates,
    ProofWork,
    disk_rates,
    expected_saving_time,
    proof_work,
    saving_time,
)
from llm_streamline.reload import NUM_NEW_TOKENS, PROMPTS, _compare_cache, logits_of
from llm_streamline.sources import load_model, resolve_model

DISK = DiskRates(write=100.0, read=1000.0)


def test_the_parts_add_up():
    found = saving_time(2000, 5.0, ProofWork(tokens=100, steps=10, passes=30), 0.01, 0.2, DISK)
    assert found.write == pytest.approx(2000 / 100 + 2000 / 1000)
    assert found.reload == pytest.approx(2000 / 1000)
    assert found.forwards == pytest.approx(5 * (100 * 0.01 + 10 * 0.2))
    assert found.start == module.START_SECONDS
    assert found.seconds == pytest.approx(sum(vars(found).values()))
    assert found.proof == pytest.approx(found.seconds - found.write)


def test_layers_that_stay_on_disk_are_read_in_every_pass():
    work = ProofWork(tokens=100, steps=10, passes=30)
    found = saving_time(2000, 5.0, work, 1e-9, 1e-9, DISK, streamed_bytes=1500)
    assert found.forwards == pytest.approx(30 * 1500 / 1000)
    assert found.reload == pytest.approx(500 / 1000)
    assert found.write == pytest.approx(2000 / 100 + 3500 / 1000)


@pytest.mark.parametrize(("window", "positions"), [(None, 128), (30, 128), (None, 16)])
def test_the_forwards_counted_are_those_of_the_proof(window, positions):
    changes = {"max_position_embeddings": positions}
    name = "mistral" if window else "llama"
    model = tiny_model(name, **changes | ({"sliding_window": window} if window else {}))
    model.generation_config.eos_token_id = None
    texts, steps, passes = [], [], []

    def count(_module, args, kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        (steps if state.shape[1] == 1 else texts).append(state.shape[0] * state.shape[1])
        passes.append(None)

    get_layers(model)[0].register_forward_pre_hook(count, with_kwargs=True)
    logits_of(model, tiny_tokens(2, min(48, positions)))
    seen = sum(texts)
    _compare_cache(model, tiny_tokens(2, min(48, positions)))
    work = proof_work(model.config, from_disk=False)
    prompts = len(PROMPTS) * module._PROMPT_TOKENS
    assert sum(texts) - seen == work.tokens - prompts - 2 * module._LOGIT_TOKENS
    if positions > 48:
        assert seen == module._LOGIT_TOKENS
    assert len(steps) == work.steps - (NUM_NEW_TOKENS - 1)
    assert len(passes) == work.passes - NUM_NEW_TOKENS - 1  # the logits of this process, and what the model writes


def test_the_disk_is_measured_and_left_as_it_was(tmp_path):
    found = disk_rates(tmp_path / "not" / "yet" / "there")
    assert found != STATED_DISK
    assert min(found.write, found.read) > 1e5
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_or_is_not_known_has_stated_rates(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError("read-only")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    assert disk_rates(tmp_path) == STATED_DISK
    assert disk_rates(None) == STATED_DISK


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return resolve_model(tiny_folder(tmp_path_factory.mktemp("saving_time")))


def test_a_plan_is_told_what_its_checkpoint_takes(source, tmp_path, monkeypatch):
    loaded = load_model(source, "float32", "cpu")
    monkeypatch.setattr(module, "step_seconds", lambda _: 2e-3)
    monkeypatch.setattr(module, "disk_rates", lambda _: DISK)
    plan, num_bytes = replacing(loaded.model, 1, 3), 10_000
    found = expected_saving_time(loaded, plan, num_bytes, 1e-3, tmp_path)
    layer = sum(p.numel() for p in get_layers(loaded.model)[0].parameters())
    units = plan.num_layers_after + loaded.model.lm_head.weight.numel() / layer
    work = proof_work(loaded.model.config, from_disk=False)
    assert found == saving_time(num_bytes, units, work, 1e-3, 2e-3, DISK)


def test_within_a_limit_saving_and_proof_are_announced(source, tmp_path, caplog):
    wishes = {"max_memory": "8GiB", "text.seq_len": 32, "target.layers": 1, "dtype": "bfloat16"}
    recipe = load_recipe(None, wishes)
    fitted = fit(source, recipe, ("save",))
    loaded = load_model(source, "bfloat16", "cpu", layers_on_disk=fitted.layers_on_disk)
    caplog.set_level(logging.INFO)
    said = announce(loaded, fitted, ("save",), tmp_path)
    assert module.START_SECONDS < said["save"] < module.START_SECONDS + 60
    assert "save " in caplog.text
    rates = measure_rates(loaded, tmp_path)
    found = saving_seconds(fitted, rates, recipe, proof_work(loaded.model.config, fitted.layers_on_disk))
    kept = fitted.model.num_layers - 1
    num_bytes = fitted.model.rest + kept * fitted.model.layer
    streamed = kept * fitted.model.layer if fitted.layers_on_disk else 0
    read = rates.read_bytes_per_second
    assert found.write == pytest.approx(num_bytes / rates.disk.write + (num_bytes + streamed) / read)
    assert torch.tensor(found.seconds).isfinite()
