"""A run that was stopped or damaged ends with the bits of an undisturbed one."""

import os
import shutil

import pytest
from small_run import bits, make_place, run

from llm_streamline.errors import OutputError
from llm_streamline.lock import locked


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place):
    run(place, place / "out")
    return place / "out"


@pytest.fixture(scope="module")
def truth(finished):
    return bits(finished)


def flip(path):
    """One bit in the middle of a file, its size as before."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_files_of_a_finished_run_are_made_again(place, finished, truth, tmp_path, caplog):
    out = shutil.copytree(finished, tmp_path / "out")
    flip(out / "streamline" / "stats.safetensors")
    (out / "streamline" / "plan.json").write_text("")
    flip(out / "streamline" / "work" / "windows" / "train.safetensors")
    flip(out / "model.safetensors")
    with caplog.at_level("INFO", logger="llm_streamline"):
        run(place, out)
    assert bits(out) == truth
    for stage in ("measure", "plan", "save"):
        assert f"{stage} was done before, but" in caplog.text
    assert "train.safetensors is damaged or missing: made again" in caplog.text
    assert "going on from the checkpoint at step" in caplog.text  # the training is kept


def test_a_truncated_ledger_costs_time_only(place, finished, truth, tmp_path, caplog):
    out = shutil.copytree(finished, tmp_path / "out")
    ledger = out / "streamline" / "stages.json"
    ledger.write_text(ledger.read_text()[:100])
    with caplog.at_level("INFO", logger="llm_streamline"):
        run(place, out)
    assert "stages.json is damaged" in caplog.text
    assert "similarities: measured before" not in caplog.text
    assert "going on from the checkpoint at step 8 of 8" in caplog.text
    assert bits(out) == truth


def test_what_is_reused_is_said(place, finished, truth, tmp_path, caplog):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "streamline" / "results.json").unlink()
    with caplog.at_level("INFO", logger="llm_streamline"):
        run(place, out)
    for sentence in ("windows: made before", "similarities: measured before", "plan: made before", "left as it is"):
        assert sentence in caplog.text
    assert bits(out) == truth


def test_fresh_starts_over(place, finished, truth, tmp_path, caplog):
    out = shutil.copytree(finished, tmp_path / "out")
    with caplog.at_level("INFO", logger="llm_streamline"):
        run(place, out, fresh=True)
    assert "before" not in caplog.text
    assert bits(out) == truth


def test_two_runs_in_one_folder(place, finished, truth):
    with locked(finished / "streamline"), pytest.raises(OutputError, match=f"process {os.getpid()} on"):
        run(place, finished, fresh=True)
    assert bits(finished) == truth
