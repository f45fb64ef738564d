"""The command line as one of several ranks, for `torchrun tests/rank_script.py COMMAND ...`.

The proof's fresh process is run inside this one: another import of torch takes longer than everything else here.
FAIL_RANK=n makes rank n fail while it measures, STOP_RANK=n tells it to stop there; STOP_AT=n tells rank 0 to stop at
the end of step n of the training. Whoever is told to stop is told alone.
"""

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

from llm_streamline import proof, ranks
from llm_streamline.cli import main
from llm_streamline.errors import NumericsError
from llm_streamline.reload import answer
from llm_streamline.stages import measure
from llm_streamline.training.history import History


def _answer_here(command, **_):
    answer(Path(command[-1]))
    return SimpleNamespace(returncode=0, stderr="")


def _failing(*_, **__):
    raise NumericsError("layer 3 is not finite on this rank alone")


def _stopped(*_, **__):
    signal.raise_signal(signal.SIGTERM)


def _stop_at(step):
    on_step_end = History.on_step_end

    def stopping(self, args, state, control, **settings):
        on_step_end(self, args, state, control, **settings)
        if state.global_step == step and ranks.is_main():
            signal.raise_signal(signal.SIGTERM)

    History.on_step_end = stopping


if __name__ == "__main__":
    proof.subprocess = SimpleNamespace(run=_answer_here, DEVNULL=subprocess.DEVNULL)  # of the proof alone
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, by a C++ compiler
    if os.environ.get("FAIL_RANK") == str(ranks.rank()):
        measure.observe = _failing
    if os.environ.get("STOP_RANK") == str(ranks.rank()):
        measure.observe = _stopped
    if step := os.environ.get("STOP_AT"):
        _stop_at(int(step))
    main()
