"""Runs one after the other: cached by content, bad ones recorded, stopped and taken up again."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from llm_streamline.errors import ConfigError, OutputError, SourceError, StreamlineError
from llm_streamline.leaderboard import make
from llm_streamline.leaderboard import run as run_module
from llm_streamline.leaderboard.board import Entry
from llm_streamline.leaderboard.make import make_leaderboard
from llm_streamline.leaderboard.page import draw
from llm_streamline.leaderboard.records import Shelf
from llm_streamline.leaderboard.run import Ending, in_process_of_its_own
from llm_streamline.output import open_output, write_manifest
from llm_streamline.runs.lock import locked

BOARD = """
title: Test
models: [demo]
layers: [3, 6]
methods:
  - {name: good, settings: {selection.verify: 1}}
  - {name: refused, settings: {selection.verify: 2}}
  - {name: broken, settings: {selection.verify: 3}}
"""


TWINS = BOARD.replace("name: refused, settings: {selection.verify: 2}", "name: twin, settings: {selection.verify: 1}")


class Runs:
    """Stands for `compress`: writes a finished folder, refuses, breaks."""

    def __init__(self):
        self.labels = []

    def __call__(self, entry: Entry, recipe, out, log_file, left):
        self.labels.append(entry.label)
        assert f"layers: {entry.layers}" in recipe.read_text()
        if entry.method == "refused":
            return Ending("refused", "PlanError: no")
        if entry.method == "broken":
            return Ending("failed", "killed by SIGKILL (out of memory?)")
        folder = open_output(out)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "streamline" / "work").mkdir(exist_ok=True)
        write_manifest(folder, {})
        return Ending("done")


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "board.yaml").write_text(BOARD)
    monkeypatch.setattr(make, "_fingerprint", lambda source: f"fingerprint of {source}")
    return tmp_path


def call(place, runs, **options):
    return make_leaderboard(place / "board.yaml", place / "out", runner=runs, **options)


def statuses(made):
    return {record.label: record.status for record in made.records}


def test_a_bad_run_is_recorded_and_does_not_stop_the_rest(place):
    runs = Runs()
    made = call(place, runs)
    assert statuses(made) == {
        f"demo/{name}/{layers}/0/0": status
        for name, status in (("good", "done"), ("refused", "refused"), ("broken", "failed"))
        for layers in (3, 6)
    }
    page = (place / "out" / "leaderboard.html").read_text()
    assert "PlanError: no" in page
    assert "out of memory" in page


def test_a_finished_run_is_never_repeated_and_bad_ones_only_when_asked(place):
    call(place, Runs())
    again, retried = Runs(), Runs()
    call(place, again)
    assert again.labels == []
    call(place, retried, retry=True)
    assert sorted(retried.labels) == [f"demo/{name}/{n}/0/0" for name in ("broken", "refused") for n in (3, 6)]


def test_a_changed_recipe_is_another_run_and_the_old_one_leaves_the_board(place):
    first = call(place, Runs())
    (place / "board.yaml").write_text(BOARD.replace("verify: 1", "verify: 4"))
    runs = Runs()
    second = call(place, runs, only=["good"])
    assert runs.labels == ["demo/good/3/0/0", "demo/good/6/0/0"]
    old = {record.key for record in first.records if record.method == "good"}
    assert not old & {record.key for record in Shelf(place / "out").board()[1]}
    assert len({record.key for record in second.records}) == 2


def test_a_filter_runs_a_portion_and_the_page_names_the_rest(place):
    runs = Runs()
    made = call(place, runs, only=["good", "layers=6"])
    assert runs.labels == ["demo/good/6/0/0"]
    assert statuses(made) == {"demo/good/6/0/0": "done"}
    assert "5 runs; the same command goes on" in (place / "out" / "leaderboard.html").read_text()


def test_weights_go_when_a_run_is_finished_unless_they_are_wanted(place):
    made = call(place, Runs(), only=["good", "layers=6"])
    shelf, key = Shelf(place / "out"), made.records[0].key
    assert not shelf.run(key).exists()
    assert shelf.has_result(key)
    assert not (shelf.result(key) / "streamline" / "work").exists()
    made = call(place, Runs(), only=["good", "layers=3"], keep_weights=True)
    assert (shelf.run(made.records[0].key) / "model.safetensors").exists()


def test_weights_that_an_earlier_call_did_not_keep_are_told_with_the_command_that_makes_them(place, caplog):
    call(place, Runs(), only=["good", "layers=6"])
    with caplog.at_level("WARNING"):
        made = call(place, Runs(), only=["good"], keep_weights=True)
    kept, lost = sorted(made.records, key=lambda record: record.layers)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{lost.label}: its weights were not kept; this makes them anew: {lost.command}"]
    assert (Shelf(place / "out").run(kept.key) / "model.safetensors").exists()


def test_a_result_that_was_deleted_is_made_again(place):
    made = call(place, Runs(), only=["good", "layers=6"])
    (Shelf(place / "out").result(made.records[0].key) / "streamline" / "manifest.json").unlink()
    runs = Runs()
    assert statuses(call(place, runs, only=["good", "layers=6"])) == {"demo/good/6/0/0": "done"}
    assert runs.labels == ["demo/good/6/0/0"]


def test_a_run_that_finished_before_a_kill_is_taken_as_it_is(place):
    class Killed(Exception):
        pass

    class Dying(Runs):
        def __call__(self, *args):
            super().__call__(*args)
            raise Killed

    with pytest.raises(Killed):
        call(place, Dying(), only=["good", "layers=6"])
    runs = Runs()
    assert statuses(call(place, runs, only=["good", "layers=6"])) == {"demo/good/6/0/0": "done"}
    assert runs.labels == []


def test_a_dry_run_runs_nothing(place):
    runs = Runs()
    made = call(place, runs, dry_run=True)
    assert runs.labels == []
    assert set(statuses(made).values()) == {"pending"}
    command = made.records[0].command
    assert command.startswith("llm-streamline compress demo -o ")
    recipe = place / "out" / "entries" / f"{made.records[0].key}.yaml"
    assert str(recipe) in command
    assert recipe.is_file()


def test_a_dry_run_writes_over_no_record_of_a_call_at_work(place):
    inside = Runs()

    def runs(entry, *arguments):
        path = place / "out" / "entries" / f"{entry.key(f'fingerprint of {entry.source}')}.json"
        written = path.read_text().replace('"reason": ""', '"reason": "of the call at work"')
        assert "of the call at work" in written
        load, changed = Shelf.load, []

        def meanwhile(shelf, key):  # the record changes just after the dry run has read it for the first time
            record = load(shelf, key)
            if key == path.stem and not changed:
                changed.append(path.write_text(written))
            return record

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Shelf, "load", meanwhile)
            call(place, Runs(), dry_run=True)
        assert path.read_text() == written
        return inside(entry, *arguments)

    made = call(place, runs)
    assert statuses(made)[inside.labels[0]] == "done"


def test_no_run_begins_when_the_time_is_over(place, monkeypatch):
    clock = iter(range(0, 100_000, 45))
    monkeypatch.setattr(run_module.time, "monotonic", lambda: next(clock))
    runs = Runs()
    made = call(place, runs, limit_minutes=3)
    assert 0 < len(runs.labels) < 6
    assert "pending" in statuses(made).values()
    with pytest.raises(ConfigError, match="more than 0"):
        call(place, runs, limit_minutes=0)


def test_a_model_that_cannot_be_read_is_refused_and_the_rest_goes_on(place, monkeypatch):
    def fingerprint(source):
        if source == "gone":
            raise SourceError("no model at gone")
        return source

    monkeypatch.setattr(make, "_fingerprint", fingerprint)
    (place / "board.yaml").write_text(BOARD.replace("[demo]", "[demo, gone]"))
    runs = Runs()
    made = call(place, runs, only=["good"])
    found = statuses(made)
    assert found["demo/good/3/0/0"] == "done"
    assert found["gone/good/3/0/0"] == "refused"
    assert all(label.startswith("demo") for label in runs.labels)


def test_methods_that_are_the_same_in_all_but_name_share_a_run(place):
    (place / "board.yaml").write_text(TWINS)
    runs = Runs()
    call(place, runs, only=["good", "twin"])
    assert runs.labels == ["demo/good/3/0/0", "demo/good/6/0/0"]
    done = [record.method for record in Shelf(place / "out").board()[1] if record.status == "done"]
    assert sorted(done) == ["good", "good", "twin", "twin"]


def test_a_folder_that_holds_something_else_is_left_alone(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no leaderboard"):
        call(place, Runs())


def test_a_kill_before_the_record_is_written_repeats_nothing(place):
    class Killed(Exception):
        pass

    def write(shelf, record):
        if record.status == "done":
            raise Killed
        written(shelf, record)

    written = Shelf.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shelf, "write", write)
        with pytest.raises(Killed):
            call(place, Runs(), only=["good", "layers=6"])
    runs = Runs()
    assert statuses(call(place, runs, only=["good", "layers=6"])) == {"demo/good/6/0/0": "done"}
    assert runs.labels == []
    assert list((place / "out" / "runs").iterdir()) == []


def test_what_was_run_on_another_model_is_never_recorded_as_of_this_one(place, monkeypatch):
    prints = {"demo": "old"}
    monkeypatch.setattr(make, "_fingerprint", prints.get)

    class Changing(Runs):
        def __call__(self, *arguments):
            prints["demo"] = "new"
            return super().__call__(*arguments)

    made = call(place, Changing(), only=["good", "layers=6"])
    assert statuses(made) == {"demo/good/6/0/0": "pending"}
    assert "changed since this call began" in made.records[0].reason
    prints["demo"] = "old"
    again = Runs()
    assert statuses(call(place, again, only=["good", "layers=6"])) == {"demo/good/6/0/0": "done"}
    assert again.labels == ["demo/good/6/0/0"]  # not taken as the changed model left it


def test_no_run_begins_on_a_model_that_changed_since_the_call_began(place, monkeypatch):
    prints = {"demo": "old"}
    monkeypatch.setattr(make, "_fingerprint", prints.get)
    monkeypatch.setattr(make, "draw", lambda shelf: prints.update(demo="new") or draw(shelf))  # after the first run
    runs = Runs()
    made = call(place, runs, only=["good"])
    assert runs.labels == ["demo/good/3/0/0"]
    assert statuses(made) == {"demo/good/3/0/0": "done", "demo/good/6/0/0": "pending"}
    assert statuses(call(place, runs, only=["good"])) == {"demo/good/3/0/0": "done", "demo/good/6/0/0": "done"}
    assert len(runs.labels) == 3  # all of the new one


def test_the_command_of_a_finished_run_follows_the_folder(place):
    call(place, Runs(), only=["good"])
    (place / "out").rename(place / "moved")
    made = make_leaderboard(place / "board.yaml", place / "moved", runner=Runs(), only=["good"])
    assert {f"-o {place}/moved/runs/{record.key}" in record.command for record in made.records} == {True}
    assert f"{place}/out" not in (place / "moved" / "leaderboard.html").read_text()


def test_no_leaderboard_to_draw(tmp_path):
    with pytest.raises(StreamlineError, match="holds no leaderboard"):
        Shelf(tmp_path).board()


# --- the process of a run


PYTHON = sys.executable
SCRIPT = """#!{python}
import os, signal, sys, time
open({seen!r}, "w").write(" ".join(sys.argv[1:]))
print("a word", file=sys.stderr)
{body}
"""


@pytest.fixture
def ending(tmp_path, monkeypatch):
    """How a run ends whose process does `body`."""

    def of(body, left=None):
        script = tmp_path / "python"
        script.write_text(SCRIPT.format(python=PYTHON, seen=str(tmp_path / "seen"), body=body))
        script.chmod(0o755)
        monkeypatch.setattr(run_module.sys, "executable", str(script))
        entry = Entry("m", "a model", "x", 3, 0, 0, None)
        return in_process_of_its_own(entry, tmp_path / "r.yaml", tmp_path / "o", tmp_path / "log", left)

    return of


def test_the_exit_code_tells_how_a_run_ended(ending, tmp_path):
    assert ending("") == Ending("done")
    assert (tmp_path / "seen").read_text() == (
        f"-m llm_streamline.cli compress a model -o {tmp_path}/o --recipe {tmp_path}/r.yaml"
    )
    refusal = ending("print('PlanError: too many', file=sys.stderr); sys.exit(2)")
    assert refusal == Ending("refused", "PlanError: too many")
    assert ending("sys.exit(1)") == Ending("failed", "a word")
    assert ending("sys.exit(143)").status == "pending"
    folder = tmp_path / "run" / "streamline"
    with locked(folder), pytest.raises(OutputError) as held, locked(folder):
        pass
    outlived = ending(f"print('OutputError: ' + {str(held.value)!r}, file=sys.stderr); sys.exit(2)")
    assert outlived == Ending("pending", f"OutputError: {held.value}")  # a call was killed, its run was not
    killed = ending("os.kill(os.getpid(), signal.SIGKILL)")
    assert killed == Ending("failed", "killed by SIGKILL (out of memory?)")


@pytest.mark.parametrize("said", ["OutputError: the disk is full: x was not written", ""])
def test_a_full_disk_ends_the_board_and_refuses_no_run_for_good(ending, monkeypatch, said):
    free = 10**9 if said else 0  # the run may not even find room to say it
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OutputError, match=r"the disk is full.*m/x/3/0/0 goes on"):
        ending(f"print({said!r}, file=sys.stderr); sys.exit(2)")


def test_a_run_is_stopped_when_the_time_is_over(ending):
    started = time.monotonic()
    assert ending("time.sleep(60)", left=1.0).status == "pending"
    assert time.monotonic() - started < 30


CHILD = """
from llm_streamline import interrupt
try:
    with interrupt.watched(), interrupt.held_back():
        open({ready!r}, "w").close()
        while not interrupt.is_requested():
            time.sleep(0.02)
        time.sleep(1)  # the end of a step
        open({saved!r}, "w").close()
except interrupt.Stopped as stopped:
    sys.exit(stopped.exit_code)
"""
PARENT = """
import signal, sys
from pathlib import Path
from llm_streamline import interrupt
from llm_streamline.leaderboard import run
from llm_streamline.leaderboard.board import Entry
signal.signal(signal.SIGINT, signal.default_int_handler)
run.sys.executable = sys.argv[1]
here = Path(sys.argv[1]).parent
with interrupt.watched():
    run.in_process_of_its_own(Entry("m", "s", "x", 3, 0, 0, None), here / "r", here / "o", here / "log", None)
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_a_group_that_is_told_to_stop_leaves_the_run_time_to_save(tmp_path):
    """Ctrl-C, and `timeout`, tell the board and its run at once: told again by the board, the run would break off."""
    ready, saved, child = tmp_path / "ready", tmp_path / "saved", tmp_path / "python"
    body = CHILD.format(ready=str(ready), saved=str(saved))
    child.write_text(SCRIPT.format(python=PYTHON, seen=str(tmp_path / "seen"), body=body))
    child.chmod(0o755)
    command = [PYTHON, "-c", PARENT, str(child)]
    parent = subprocess.Popen(command, process_group=0, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(parent.pid, signal.SIGINT)
        parent.wait(60)
    finally:
        parent.kill()
    assert saved.exists()
