"""What a training leaves beside its weights: the log of its losses, and the best state so far."""

import json
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_streamline.files import saving, write_json, write_tensors
from llm_streamline.logs import Bar, get_logger
from llm_streamline.training.checkpoints import link_or_copy
from llm_streamline.training.student import Student

_LOG_FILE = "history.json"
_BEST_FILE = "best.safetensors"
log = get_logger()


class History(TrainerCallback):
    """Keeps the training log, keeps the best state, stops when training hurts, moves the bar.

    The best state is the one with the lowest LM loss on validation text, the untrained start (step 0) included: a
    replacement that training made worse is never handed over.
    """

    def __init__(self, student: Student, folder: Path, tokens_per_step: int, patience: int, bar: Bar):
        self._student, self._folder, self._patience, self._bar = student, folder, patience, bar
        self._tokens_per_step = tokens_per_step
        self._best_file: Path | None = None  # where the best state lies on the disk already
        self._started, self._before = time.perf_counter(), 0.0
        self.steps: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None

    def load(self, checkpoint: Path) -> tuple[float, int]:
        """Take up the log and the best state of an earlier process; return the running loss it was saved with."""
        data = json.loads((checkpoint / _LOG_FILE).read_text(encoding="utf-8"))
        self.steps, self.validation, self._before = data["steps"], data["validation"], data["seconds"]
        self._best_file = checkpoint / _BEST_FILE
        self.best = load_file(self._best_file)
        return data["running_loss"]

    def save(self, checkpoint: Path, running_loss: tuple[float, int]) -> None:
        """Write log and best state into a checkpoint.

        Raises:
            OutputError: the disk is full.
        """
        with saving(checkpoint):
            if self._best_file is not None and self._best_file.is_file():
                link_or_copy(self._best_file, checkpoint / _BEST_FILE)
            else:
                save_file(self.best, checkpoint / _BEST_FILE)
        self._best_file = checkpoint / _BEST_FILE
        write_json(checkpoint / _LOG_FILE, {**self.to_dict(), "running_loss": running_loss})

    def has_validated(self, step: int) -> bool:
        """Whether the log holds a validation at this step."""
        return any(row["step"] == step for row in self.validation)

    @property
    def best_step(self) -> int:
        """Step of the lowest validation LM loss."""
        return int(min(self.validation, key=lambda row: row["lm_loss"])["step"])

    @property
    def gives_up(self) -> bool:
        """Whether so many validations went by without gain that training ends."""
        since_best = sum(row["step"] > self.best_step for row in self.validation)
        return bool(self._patience) and since_best >= self._patience

    @property
    def seconds(self) -> float:
        """Wall time over all processes that worked on this run."""
        return self._before + time.perf_counter() - self._started

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        rate = state.global_step * self._tokens_per_step / max(self.seconds, 1e-9)
        loss = f" loss {self.steps[-1]['loss']:.4f}" if self.steps else ""
        self._bar.advance()
        self._bar.note(f"{rate:,.0f} tokens/s{loss}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        """Keep the training loss and the learning rate."""
        if logs and "loss" in logs:
            step = state.global_step
            self.steps.append(
                {
                    "step": step,
                    "tokens": step * self._tokens_per_step,
                    "loss": float(logs["loss"]),
                    "lr": float(logs["learning_rate"]),
                    "grad_norm": float(logs.get("grad_norm", float("nan"))),
                    "seconds": round(self.seconds, 3),
                }
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **_: Any
    ) -> None:
        """Keep the state when it is the best so far; stop after `patience` validations without gain."""
        step, value = state.global_step, metrics["eval_lm_loss"]
        if self.has_validated(step):
            return  # a resumed run validates its checkpoint's step once more
        best_before = min((row["lm_loss"] for row in self.validation), default=float("inf"))
        tokens = step * self._tokens_per_step
        self.validation.append({"step": step, "tokens": tokens, "loss": metrics["eval_loss"], "lm_loss": value})
        log.info("step %d: validation loss %.4f, LM loss %.4f", step, metrics["eval_loss"], value)
        if value < best_before:
            self._keep_best(in_file=args.world_size == 1)
        if self.gives_up:
            log.info(
                "no gain in %d validations: training stops, the state of step %d is kept",
                self._patience,
                self.best_step,
            )
            control.should_training_stop = True

    def _keep_best(self, in_file: bool) -> None:
        """Copy the student's state, because live tensors would follow the training (specifications D6).

        One process alone copies it to a file and maps that, which takes no memory; several would write the same one.

        Raises:
            OutputError: the disk is full.
        """
        if not in_file:
            self._best_file = None
            self.best = {name: p.detach().cpu().clone() for name, p in self._student.state_dict().items()}
            return
        path = write_tensors(self._folder / _BEST_FILE, self._student.state_dict())
        self._best_file, self.best = path, load_file(path)

    def to_dict(self) -> dict[str, Any]:
        """The log, as it goes into training.json."""
        return {"steps": self.steps, "validation": self.validation, "seconds": round(self.seconds, 3)}
