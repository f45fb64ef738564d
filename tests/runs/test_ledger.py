import json

import pytest

from llm_streamline.runs import ledger as ledger_module
from llm_streamline.runs.ledger import Ledger, key_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "streamline").mkdir()
    return tmp_path / "streamline"


def done(folder, stage="plan", key="k", content="x"):
    ledger = Ledger(folder)
    with ledger.running(stage, key) as made:
        (folder / f"{stage}.json").write_text(content)
        made.append(folder / f"{stage}.json")
    return Ledger(folder)  # as the next process reads it


def test_a_finished_stage_is_done_for_its_key_only(folder):
    ledger = done(folder)
    assert ledger.is_done("plan", "k")
    assert not ledger.is_done("plan", "other")
    assert not ledger.is_done("measure", "k")
    assert ledger.key("plan") == "k"
    assert ledger.seconds.keys() == {"plan"}


def test_a_stage_that_failed_is_not_done(folder):
    ledger = Ledger(folder)
    with pytest.raises(RuntimeError), ledger.running("plan", "k"):
        raise RuntimeError
    assert not Ledger(folder).is_done("plan", "k")


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("y"), lambda p: p.write_text("")])
def test_a_stage_whose_file_is_damaged_or_missing_is_not_done_and_says_so(folder, caplog, damage):
    done(folder, "measure")
    ledger = done(folder)
    damage(folder / "plan.json")
    assert not ledger.is_done("plan", "k")
    assert "plan was done before, but" in caplog.text
    assert str(folder / "plan.json") in caplog.text
    assert ledger.is_done("measure", "k")
    assert ledger.damaged("plan") == [folder / "plan.json"]
    assert not ledger.is_intact(["plan"])


def test_other_times_of_files_mean_nothing(folder):
    import os

    ledger = done(folder)
    os.utime(folder / "plan.json", (2**33, 2**33))
    os.utime(folder / "stages.json", (0, 0))
    assert ledger.is_done("plan", "k")
    assert Ledger(folder).is_intact(["plan"])


@pytest.mark.parametrize("content", ["", '{"plan": {"ke', "[]", '{"plan": 3}', '{"plan": {"key": "k"}}', "\0"])
def test_a_damaged_ledger_is_said_and_everything_is_done_again(folder, caplog, content):
    done(folder)
    (folder / "stages.json").write_text(content)
    ledger = Ledger(folder)
    assert "is damaged" in caplog.text
    assert not ledger.is_done("plan", "k")
    assert not ledger.is_intact(["plan"])
    assert done(folder).is_done("plan", "k")


def test_another_version_of_torch_is_said_and_kept(folder, caplog, monkeypatch):
    ledger = done(folder)
    monkeypatch.setattr(ledger_module, "package_versions", lambda names: dict.fromkeys(names, "99"))
    assert ledger.is_done("plan", "k")
    assert "torch" in caplog.text
    assert "--fresh" in caplog.text


def test_files_are_recorded_relative_to_the_output_folder(folder, tmp_path):
    done(folder)
    moved = tmp_path.rename(tmp_path.with_name("moved")) / "streamline"
    assert Ledger(moved).is_done("plan", "k")
    assert list(json.loads((moved / "stages.json").read_text())["plan"]["files"]) == ["streamline/plan.json"]
    moved.parent.rename(tmp_path)


def test_keys_tell_every_part():
    assert key_of("a", {"b": 1}) == key_of("a", {"b": 1})
    assert len({key_of("a", "b"), key_of("ab"), key_of("b", "a"), key_of(["a", "b"])}) == 4
