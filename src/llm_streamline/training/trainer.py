"""The loop: one transformers.Trainer subclass, and the callbacks that keep its best state and its log.

Accumulation, schedules, clipping, checkpoints, resume, trackers and distributed engines are the Trainer's. Ours are the
optimiser's groups (no weight decay on norms and biases), a validation in the objective and in LM loss, and the best
state, kept as a deep copy with the untrained start as a candidate.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_streamline.config import TrainingConfig
from llm_streamline.data.windows import Windows
from llm_streamline.errors import ConfigError, NumericsError
from llm_streamline.logs import Bar, get_logger, progress_bar
from llm_streamline.training.student import Student

_STATE_FILE = "trainer_state.json"  # the Trainer writes it last, so a checkpoint without it is half-written
_BEST_FILE = "best.safetensors"
log = get_logger()


class WindowDataset(Dataset):
    """Windows as the Trainer wants them. A training set shorter than its budget is repeated from its start."""

    def __init__(self, windows: Windows, num_windows: int | None = None):
        self._windows = windows
        self._length = len(windows) if num_windows is None else num_windows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self._length:
            raise IndexError(index)
        return {"input_ids": torch.as_tensor(self._windows.input_ids[index % len(self._windows)])}


class StreamlineTrainer(Trainer):
    """Trains what a `Student` holds: replacement networks, healed weights, or both."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own, with a learning rate apart for weights that the original has already learned."""
        optimizer = super().create_optimizer(model)
        student: Student = self.accelerator.unwrap_model(self.model)
        if student.healed is None:
            return optimizer
        healed = {id(parameter) for parameter in student.healed.parameters()}
        for group in list(optimizer.param_groups):
            ours = [parameter for parameter in group["params"] if id(parameter) in healed]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in healed]
            if ours:
                rate = student.healing_rate
                optimizer.add_param_group({"params": ours, "weight_decay": group["weight_decay"], "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the student's own loss.

        Raises:
            NumericsError: if it is not finite: going on would only spread it.
        """
        outputs = model(**inputs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise NumericsError(
                f"the training loss became {loss.item()} at step {self.state.global_step}; "
                f"lower training.learning_rate (now {self.args.learning_rate:g}) or training.max_grad_norm"
            )
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only: norms and biases are never decayed (the reference decays them, specifications D25)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Mean objective and LM loss over the validation windows."""
        student: Student = self.accelerator.unwrap_model(self.model)
        sums, count = {"loss": 0.0, "lm_loss": 0.0}, 0
        for batch in self.get_eval_dataloader():
            ids = self._prepare_inputs(batch)["input_ids"]
            found = student(ids, with_token_losses=True)
            sums["loss"] += float(found["loss"]) * len(ids)
            sums["lm_loss"] += float(found["token_losses"].double().mean()) * len(ids)
            count += len(ids)
        metrics = {f"{metric_key_prefix}_{name}": value / count for name, value in sums.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class History(TrainerCallback):
    """Writes the training log, keeps the best state, stops when training hurts, moves the bar.

    The best state is the one with the lowest LM loss on validation text, the untrained start (step 0) included: a
    replacement that training made worse is never handed over.
    """

    def __init__(self, student: Student, folder: Path, tokens_per_step: int, patience: int, bar: Bar):
        self._student, self._folder, self._patience, self._bar = student, folder, patience, bar
        self._tokens_per_step = tokens_per_step
        self._file = folder / "history.json"
        self._started, self._before = time.perf_counter(), 0.0
        self.steps: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self.best: dict[str, Tensor] | None = None

    def load(self, step: int) -> None:
        """Take up the log and best state of an earlier process, up to the checkpoint at `step`."""
        data = json.loads(self._file.read_text(encoding="utf-8"))
        self.steps = [row for row in data["steps"] if row["step"] <= step]
        self.validation = [row for row in data["validation"] if row["step"] <= step]
        self._before = data["seconds"]
        self.best = load_file(self._folder / _BEST_FILE)

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
        if any(row["step"] == step for row in self.validation):
            return  # a resumed run validates its checkpoint's step once more
        best_before = min((row["lm_loss"] for row in self.validation), default=float("inf"))
        tokens = step * self._tokens_per_step
        self.validation.append({"step": step, "tokens": tokens, "loss": metrics["eval_loss"], "lm_loss": value})
        log.info("step %d: validation loss %.4f, LM loss %.4f", step, metrics["eval_loss"], value)
        if value < best_before:
            # a deep copy: references to live tensors would follow the training (specifications D6)
            self.best = {name: p.detach().cpu().clone() for name, p in self._student.state_dict().items()}
            self._write_best()
        if self.gives_up:
            log.info(
                "no gain in %d validations: training stops, the state of step %d is kept",
                self._patience,
                self.best_step,
            )
            control.should_training_stop = True
        self.write()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the log with each checkpoint."""
        self.write()

    def _write_best(self) -> None:
        temporary = self._folder / (_BEST_FILE + ".tmp")
        save_file(self.best, temporary)
        temporary.replace(self._folder / _BEST_FILE)

    def write(self) -> None:
        """Write the log so far, atomically."""
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.to_dict()), encoding="utf-8")
        temporary.replace(self._file)

    def to_dict(self) -> dict[str, Any]:
        """The log, as it goes into training.json."""
        return {"steps": self.steps, "validation": self.validation, "seconds": round(self.seconds, 3)}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; half-written ones, left by a killed run, are deleted."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
            whole.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


def train_student(
    student: Student, config: TrainingConfig, windows: Windows, validation: Windows, folder: Path, seed: int
) -> dict[str, Any]:
    """Train, keep the best state in the student, and return the log.

    Args:
        student: the replacements and what they are trained in.
        config: budget, objective, optimiser.
        windows: training windows; repeated when fewer than the budget asks for.
        validation: windows whose LM loss decides which state is kept.
        folder: checkpoints and log; a run that was killed goes on from what it finds here.
        seed: order of the windows.

    Raises:
        ConfigError: if `config.arguments` holds something that TrainingArguments does not know.
        NumericsError: if the loss stops being finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    seq_len = windows.input_ids.shape[1]
    num_steps = max(1, config.tokens // (seq_len * batch))
    eval_every = max(1, num_steps // config.num_evals) if config.num_evals else num_steps
    arguments = training_arguments(config, num_steps, eval_every, folder, seed, student_device(student))
    rows = max(1, min(len(validation), config.validation_tokens // validation.input_ids.shape[1]))
    with progress_bar("training", num_steps) as bar:
        history = History(student, folder, seq_len * batch, config.early_stopping_patience, bar)
        trainer = StreamlineTrainer(
            model=student,
            args=arguments,
            train_dataset=WindowDataset(windows, num_steps * batch),
            eval_dataset=WindowDataset(validation, rows),
            data_collator=lambda items: {"input_ids": torch.stack([item["input_ids"] for item in items])},
            callbacks=[history],
        )
        for callback in _unwanted_callbacks(trainer):
            trainer.remove_callback(callback)
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            trainer.evaluate()  # step 0 is a candidate
        else:
            step = int(checkpoint.name.rpartition("-")[2])
            log.info("going on from the checkpoint at step %d of %d", step, num_steps)
            history.load(step)
            bar.advance(step)
        if checkpoint and history.gives_up:  # it was killed when it had stopped early
            trainer.state.global_step = step
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if history.validation[-1]["step"] != trainer.state.global_step:
            trainer.evaluate()
        history.write()
    student.load_state_dict(history.best)
    done = history.to_dict()
    tokens = trainer.state.global_step * seq_len * batch
    return {
        **done,
        "objective": dict(config.objective),
        "trainable": config.trainable,
        "best_step": history.best_step,
        "tokens": tokens,
        "passes": round(trainer.state.global_step * batch / len(windows), 3),
        "tokens_per_second": round(tokens / max(done["seconds"], 1e-9), 1),
        "trainable_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }


def student_device(student: Student) -> torch.device:
    """Where the student's parameters are."""
    return next(student.parameters()).device


def training_arguments(
    config: TrainingConfig, num_steps: int, eval_every: int, folder: Path, seed: int, device: torch.device
) -> TrainingArguments:
    """Translate our settings; everything is counted in optimiser steps (specifications D7).

    Raises:
        ConfigError: if `config.arguments` holds something that TrainingArguments does not know or accept.
    """
    same_name = (
        "learning_rate",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    )
    settings = {
        **{name: getattr(config, name) for name in same_name},
        "output_dir": str(folder),
        "max_steps": num_steps,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": config.min_learning_rate},
        "warmup_steps": round(config.warmup_ratio * num_steps),
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "eval_strategy": "steps" if config.num_evals else "no",
        "eval_steps": eval_every,
        "save_strategy": "steps",
        "save_steps": eval_every,
        "save_total_limit": 2,
        "logging_steps": max(1, num_steps // 200),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
    }
    try:
        return TrainingArguments(**{**settings, **config.arguments})
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"training.arguments: {problem}") from None


def _unwanted_callbacks(trainer: Trainer) -> Sequence[type]:
    from transformers import PrinterCallback, ProgressCallback

    present = {type(callback) for callback in trainer.callback_handler.callbacks}
    return [kind for kind in (PrinterCallback, ProgressCallback) if kind in present]
