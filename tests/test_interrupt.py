"""Signals end a run cleanly, the second one at once."""

import os
import signal
import subprocess
import sys

import pytest

from llm_streamline import interrupt

WAIT = """
import time
from llm_streamline import interrupt
try:
    with interrupt.watched(), interrupt.held_back():
        print("ready", flush=True)
        for _ in range({rounds}):
            time.sleep(0.05)
            {inside}
    print("done", flush=True)
except interrupt.Stopped as stopped:
    print("stopped by", stopped.name, flush=True)
    raise SystemExit(stopped.exit_code)
"""
ALLOWING = "with interrupt.allowed(): pass"


def start(rounds, inside="pass"):
    code = WAIT.format(rounds=rounds, inside=inside)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_stops_where_that_is_allowed(number, code):
    process = start(600, ALLOWING)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == f"stopped by {number.name}\n"
    assert "once more stops at once" in err


def test_it_stops_at_the_end_of_what_must_not_be_left():
    process = start(4)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "stopped by SIGTERM\n")


def test_the_second_signal_kills_at_once():
    process = start(600)
    process.send_signal(signal.SIGTERM)
    while "once more" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT


def test_nothing_is_asked_for_without_a_signal():
    with interrupt.watched(), interrupt.held_back():
        assert not interrupt.is_requested()
        interrupt.check()
        with interrupt.allowed():
            interrupt.check()


def test_outside_of_what_holds_it_back_it_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(interrupt.Stopped), interrupt.watched():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not interrupt.is_requested()


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.watched():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_handler_does_not_take_it_for_an_error():
    assert not issubclass(interrupt.Stopped, Exception)
