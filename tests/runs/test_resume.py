"""A run that was stopped or damaged ends with the bits of an undisturbed one."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from small_run import bits, in_child, make_place, run, wait

from llm_streamline.cli import main
from llm_streamline.errors import OutputError
from llm_streamline.runs.lock import locked
from llm_streamline.training.student import Student


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


KILLED_AT = ("train.json", "stats.json", "plan.json", "start.json", "sealed.json", "config.json", "results.json")


def test_a_run_killed_in_every_stage_ends_with_the_same_bits(place, truth, tmp_path):
    """SIGKILL in the moment before a file of that name appears; each start goes on to the next such moment."""
    out, log = tmp_path / "out", tmp_path / "log"
    for name in (*KILLED_AT, "manifest.json"):
        pid = in_child(lambda name=name: (_kill_before(name), run(place, out)), log)
        assert wait(pid) == -signal.SIGKILL, (name, log.read_text())
    run(place, out)
    assert bits(out) == truth


def _kill_before(name):
    replace = os.replace

    def kill_or_replace(source, target):
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = kill_or_replace


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_ends_cleanly_and_says_how_to_go_on(place, truth, tmp_path, caplog, number, code):
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["compress", str(place / "model"), "-o", str(out), "--recipe", str(place / "recipe.yaml")]
    words += ["--text", str(place / "text.jsonl")]

    def command():
        calls, forward = [], Student.forward

        def stopping(self, *args, **kwargs):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == 6:
                os.kill(os.getpid(), number)
            return forward(self, *args, **kwargs)

        Student.forward = stopping
        sys.argv = ["llm-streamline", *words, "--fresh"]
        main()

    assert wait(in_child(command, log)) == code
    said = log.read_text().replace("\n", " ")
    assert f"stopped by {number.name}; to go on: llm-streamline {' '.join(words)} " in said + " "
    with caplog.at_level("INFO", logger="llm_streamline"):
        run(place, out)
    assert "going on from the checkpoint at step 5 of 8" in caplog.text
    assert bits(out) == truth


def test_a_limit_of_memory_is_another_run_where_it_changes_what_is_trained(finished, place, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    log = out / "streamline" / "training.json"
    assert json.loads(log.read_text())["trainable"] == "above"
    run(place, out, overrides={"max_memory": "8GiB"})
    assert json.loads(log.read_text())["trainable"] == "replacement"


def test_two_runs_in_one_folder(place, finished, truth):
    with locked(finished / "streamline"), pytest.raises(OutputError, match=f"process {os.getpid()} on"):
        run(place, finished, fresh=True)
    assert bits(finished) == truth
