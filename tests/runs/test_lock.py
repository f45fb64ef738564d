"""One run at a time: the second is refused in one sentence, a lock that nobody holds any more is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from llm_streamline.errors import OutputError
from llm_streamline.output import check_output, open_output, withdraw
from llm_streamline.runs import lock
from llm_streamline.runs.lock import LOCK_FILE, locked

HOLD = "import sys, pathlib; from llm_streamline.runs.lock import locked\n"
HOLD += "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def _no_system_locks(monkeypatch):
    monkeypatch.setattr(lock, "_lock", lambda _handle: None)


def write_holder(folder, **changes):
    (folder / LOCK_FILE).write_text(json.dumps(lock._myself() | changes))


def test_the_second_is_refused_and_told_who_is_first(tmp_path, other):
    with pytest.raises(OutputError) as refusal, locked(tmp_path):
        pass
    message = str(refusal.value)
    assert f"process {other.pid} on {socket.gethostname()}" in message
    assert "\n" not in message
    assert refusal.value.exit_code == 2
    assert (tmp_path / LOCK_FILE).exists()  # still the other's


@pytest.mark.usefixtures("_no_system_locks")
def test_the_second_is_refused_where_the_file_system_knows_no_locks(tmp_path, other):
    with pytest.raises(OutputError, match=f"process {other.pid} on"), locked(tmp_path):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path, other, caplog):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with caplog.at_level("INFO"), locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"process {other.pid}" in caplog.text
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.usefixtures("_no_system_locks")
@pytest.mark.parametrize("changes", [{"boot": "an earlier one"}, {"born": "1"}, {"pid": 2**22 + 1}])
def test_a_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, changes):
    """After a reboot, or when the number went to another process."""
    write_holder(tmp_path, **changes)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == lock._myself()


@pytest.mark.usefixtures("_no_system_locks")
def test_a_process_of_another_machine_may_be_alive(tmp_path):
    write_holder(tmp_path, host="elsewhere")
    wanted = f"on elsewhere.*if it is gone, delete {tmp_path / LOCK_FILE}"
    with pytest.raises(OutputError, match=wanted), locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\0\0"])
def test_a_lock_file_that_says_nothing_locks_nothing(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with locked(tmp_path):
        pass


def test_a_failed_run_gives_the_folder_back(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_other_processes_of_the_same_run_do_not_lock(tmp_path, other, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path):
        assert other.poll() is None


def test_no_clock_is_looked_at(tmp_path, other, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    with pytest.raises(OutputError), locked(tmp_path):
        pass


def test_a_read_only_folder_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(OutputError, match="not writable"), locked(tmp_path / "a"):
        pass


def test_a_folder_with_nothing_but_a_lock_is_ours(tmp_path):
    """Killed between taking the lock and writing the marker."""
    out = tmp_path / "out"
    (out / "streamline").mkdir(parents=True)
    (out / "streamline" / LOCK_FILE).write_text("{}")
    (out / "streamline" / ".streamline-tmp-x").write_text("")
    assert check_output(out) == out
    (out / "streamline" / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="not made by"):
        check_output(out)


def test_starting_over_and_withdrawing_respect_the_lock(tmp_path):
    out = tmp_path / "out"
    open_output(out)
    with locked(out / "streamline"):
        open_output(out, fresh=True)
        assert (out / "streamline" / LOCK_FILE).exists()
        withdraw(out, existed=False)
    assert not out.exists()
