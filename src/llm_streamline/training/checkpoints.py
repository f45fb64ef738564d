"""Checkpoints of a training: when they are written, sealed when whole, verified before they are used.

The Trainer writes a checkpoint file by file. Ours is whole when a last file, the seal, holds the sha256 of all others;
what has no sound seal was left by a killed run, a full disk or a failing one, and is never read. Age and order are told
by the step in the name, never by a file's times.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_streamline import interrupt
from llm_streamline.files import remove, saving, sha256_of, sync_folder, sync_tree, write_json
from llm_streamline.logs import get_logger

SEAL_FILE = "sealed.json"
NUM_KEPT = 2  # the newest, and one before it in case it is damaged
SAVE_SECONDS = 600.0  # of training that a power cut may cost
log = get_logger()


def seal(folder: Path) -> None:
    """Force the files of a checkpoint to the disk and note their checksums: from now on it counts.

    Raises:
        OutputError: the disk is full, or the folder is not writable.
    """
    with saving(folder):
        sync_tree(folder)
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())  # DeepSpeed writes a folder of its own
        sums = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
        sums.pop(SEAL_FILE, None)
        write_json(folder / SEAL_FILE, sums)
        sync_folder(folder.parent)


def is_sound(folder: Path) -> bool:
    """Whether a checkpoint was sealed and every file of it is as it was then."""
    try:
        files = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        return all(sha256_of(folder / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def step_of(folder: Path) -> int:
    """The optimiser step of a checkpoint; -1 for a folder that is none."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def last_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint; newer ones that are damaged or half-written are deleted, and it is said."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if step_of(path) >= 0 and is_sound(path):
            return path
        log.warning("%s is damaged or half-written: deleted", path)
        remove(path)
    return None


def keep_newest(folder: Path) -> None:
    """Delete all checkpoints but the newest ones."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of)[:-NUM_KEPT]:
        remove(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system knows no second names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Timing:
    """Whether a step ends with a checkpoint out of turn: much time has passed, or the run is told to stop."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def saved(self) -> None:
        """A checkpoint was written just now."""
        self._last = time.monotonic()

    def ask(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; the same answer in all processes of a run, if one of them says so."""
        stop, save = interrupt.is_requested(), time.monotonic() - self._last > SAVE_SECONDS
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            answers = torch.tensor([stop, save], dtype=torch.int32, device=device)
            torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX)
            stop, save = (bool(answer) for answer in answers.tolist())
            if stop:
                interrupt.agree()  # perhaps another process alone was told
        return stop, stop or save


class Safety(TrainerCallback):
    """Saves out of turn, ends training when the run is told to stop, and carries the running loss over a restart.

    The running loss is the Trainer's sum since its last line of the log; a resumed Trainer would begin it anew, and the
    next line would tell another mean than that of an undisturbed run.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self.timing = trainer, Timing()
        self._at_step_begin: tuple[Tensor | float, int] | None = None
        self.resumed_loss: tuple[float, int] | None = None

    def running_loss(self) -> tuple[float, int]:
        """The sum as it was after the last finished step, and the step of the last line of the log."""
        total, logged = self._at_step_begin or self._now()
        return float(total), logged

    def _now(self) -> tuple[Tensor | float, int]:
        total = getattr(self._trainer, "_tr_loss", 0.0)  # the Trainer's own; without it the log alone differs
        total = total.detach().clone() if isinstance(total, Tensor) else total
        return total, getattr(self._trainer, "_globalstep_last_logged", 0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Take up the running loss of an earlier process."""
        if self.resumed_loss is not None and isinstance(getattr(self._trainer, "_tr_loss", None), Tensor):
            self._trainer._tr_loss.fill_(self.resumed_loss[0])
            self._trainer._globalstep_last_logged = self.resumed_loss[1]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Remember the sum before the step's own losses are added."""
        self._at_step_begin = self._now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint when it is time, and for the end when the run is told to stop."""
        self._at_step_begin = None
        stop, save = self.timing.ask()
        control.should_save = control.should_save or save
        control.should_training_stop = control.should_training_stop or stop
