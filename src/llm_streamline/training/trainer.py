"""The loop: one transformers.Trainer subclass, stopped and resumed without a trace, and halved when memory ends.

Accumulation, schedules, clipping, checkpoints, resume, trackers and distributed engines are the Trainer's. Ours are the
optimiser's groups (no weight decay on norms and biases), a validation in the objective and in LM loss, the best state,
kept as a deep copy with the untrained start as a candidate, and checkpoints that can be trusted.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from llm_streamline import interrupt, ranks
from llm_streamline.config import TrainingConfig
from llm_streamline.data.windows import Windows
from llm_streamline.errors import NumericsError, OutOfMemoryError, OutputError
from llm_streamline.files import remove, saving
from llm_streamline.logs import get_logger, progress_bar
from llm_streamline.memory_limits import BatchTooLarge, free_memory, no_room_for
from llm_streamline.training.arguments import training_arguments
from llm_streamline.training.checkpoints import Safety, is_sound, keep_newest, last_checkpoint, seal, step_of
from llm_streamline.training.history import History
from llm_streamline.training.states import CachedStates
from llm_streamline.training.student import Student

log = get_logger()


class WindowDataset(Dataset):
    """Windows as the Trainer wants them. A training set shorter than its budget is repeated from its start."""

    def __init__(self, windows: Windows, num_windows: int | None = None, states: CachedStates | None = None):
        self._windows, self._states = windows, states
        self._length = len(windows) if num_windows is None else num_windows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self._length:
            raise IndexError(index)
        index %= len(self._windows)
        states = self._states[index] if self._states is not None else {}
        return {"input_ids": torch.as_tensor(self._windows.input_ids[index]), **states}


def num_steps(config: TrainingConfig, seq_len: int) -> int:
    """Optimiser steps that the token budget is good for."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return max(1, config.tokens // (seq_len * batch))


def num_windows_seen(config: TrainingConfig, windows: Windows) -> int:
    """Different windows that a training will come to: the first ones of the set."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return min(len(windows), num_steps(config, windows.seq_len) * batch)


class StreamlineTrainer(Trainer):
    """Trains what a `Student` holds: replacement networks, healed weights, or both."""

    def __init__(self, history: History | None = None, **settings: Any):
        self.history, self.safety = history, Safety(self)
        super().__init__(callbacks=[*([history] if history else ()), self.safety], **settings)
        if self.args.world_size == 1:
            self.accelerator.device_placement = False  # it would be the first device, whichever was asked for

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
        with self._may_stop():
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
        rows: list[tuple[float, float, int]] = []
        for batch, mine in ranks.deal(self._eval_batches()):
            ids = self._prepare_inputs(batch)["input_ids"]
            with self._may_stop(), no_room_for(len(ids)):
                found = student(ids, with_token_losses=True)
            if mine:
                rows.append((float(found["loss"]), float(found["token_losses"].double().mean()), len(ids)))
        rows = ranks.collected(rows)
        count = sum(size for *_, size in rows)
        sums = {"loss": sum(loss * n for loss, _, n in rows), "lm_loss": sum(loss * n for _, loss, n in rows)}
        metrics = {f"{metric_key_prefix}_{name}": value / count for name, value in sums.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self) -> Iterator[dict[str, Tensor]]:
        """The validation windows in order; the same batches for any number of ranks."""
        size, count = self.args.per_device_eval_batch_size, len(self.eval_dataset)
        for first in range(0, count, size):
            yield self.data_collator([self.eval_dataset[i] for i in range(first, min(first + size, count))])

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch.

        Raises:
            BatchTooLarge: there is not memory enough for it; no weight was changed.
        """
        with no_room_for(len(inputs["input_ids"])):
            return super().training_step(model, inputs, *args, **kwargs)

    def _may_stop(self) -> contextlib.AbstractContextManager:
        """Several processes stop together, at the end of a step; one alone stops at once."""
        return interrupt.allowed() if self.args.world_size == 1 else contextlib.nullcontext()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that counts only when all of it is on the disk.

        Raises:
            OutputError: the disk is full; what was written of it is removed, the one before stays.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with saving(folder):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes a file of its own
            if self.args.should_save:
                if self.history is not None:
                    self.history.save(folder, self.safety.running_loss())
                seal(folder)
                keep_newest(folder.parent)
        except OutputError:
            if self.args.should_save:
                with contextlib.suppress(OSError):
                    remove(folder)
            raise
        self.safety.timing.saved()

    def save_last_step(self) -> None:
        """Write a checkpoint of the last finished step, in the middle of the next one."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step and not is_sound(folder):
            self._save_checkpoint(self.model, None)
            log.info("checkpoint written at step %d", self.state.global_step)


def train_student(
    student: Student,
    config: TrainingConfig,
    windows: Windows,
    validation: Windows,
    folder: Path,
    seed: int,
    states: CachedStates | None = None,
) -> dict[str, Any]:
    """Train, keep the best state in the student, and return the log.

    When memory ends, training goes on from its last step with half as many windows at once, accumulated twice as often:
    the same optimiser steps but for rounding.

    Args:
        student: the replacements and what they are trained in.
        config: budget, objective, optimiser.
        windows: training windows; repeated when fewer than the budget asks for.
        validation: windows whose LM loss decides which state is kept.
        folder: checkpoints; a run that was killed goes on from what it finds here.
        seed: order of the windows.
        states: the original's states on the training windows; None: computed in every step.

    Raises:
        ConfigError: if `config.arguments` holds something that TrainingArguments does not know.
        NumericsError: if the loss stops being finite.
        OutOfMemoryError: if not even one window fits.
        OutputError: if a checkpoint cannot be written.
        Stopped: if the run was told to stop; the last finished step is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with interrupt.held_back():
                return _train(student, config, windows, validation, folder, seed, states)
        except BatchTooLarge as problem:
            config = _with_smaller_batch(config, str(problem))
        free_memory()


def _with_smaller_batch(config: TrainingConfig, problem: str) -> TrainingConfig:
    """Fewer windows at once, the same windows in an optimiser step."""
    size, times = config.per_device_train_batch_size, config.gradient_accumulation_steps
    smaller = next((n for n in range(size // 2, 0, -1) if size % n == 0), None)
    if smaller is None or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise OutOfMemoryError(
            f"out of memory in training ({problem}); "
            + ("lower training.per_device_train_batch_size, " if smaller else "shorten text.seq_len, ")
            + "train with the objective mse, which runs fewer layers, or use a machine with more memory"
        )
    log.warning(
        "out of memory with %s; going on with %d windows at once, accumulated %d times",
        problem,
        smaller,
        times * size // smaller,
    )
    return config.model_copy(
        update={"per_device_train_batch_size": smaller, "gradient_accumulation_steps": times * size // smaller}
    )


def _train(
    student: Student,
    config: TrainingConfig,
    windows: Windows,
    validation: Windows,
    folder: Path,
    seed: int,
    states: CachedStates | None,
) -> dict[str, Any]:
    shared = share_step(config, ranks.world_size())
    batch = shared.per_device_train_batch_size * shared.gradient_accumulation_steps * ranks.world_size()
    seq_len = windows.input_ids.shape[1]
    steps = max(1, config.tokens // (seq_len * batch))
    eval_every = max(1, steps // config.num_evals) if config.num_evals else steps
    arguments = training_arguments(shared, steps, eval_every, folder, seed, student.input_device)
    arguments.per_device_eval_batch_size = config.per_device_train_batch_size  # as alone: the same sums
    ranks.same_tensors(student.state_dict().values())
    rows = max(1, min(len(validation), config.validation_tokens // validation.input_ids.shape[1]))
    with progress_bar("training", steps) as bar:
        history = History(student, folder, seq_len * batch, config.early_stopping_patience, bar)
        trainer = StreamlineTrainer(
            history,
            model=student,
            args=arguments,
            train_dataset=WindowDataset(windows, steps * batch, states),
            eval_dataset=WindowDataset(validation, rows),
            data_collator=lambda items: {name: torch.stack([item[name] for item in items]) for name in items[0]},
        )
        for callback in _unwanted_callbacks(trainer):
            trainer.remove_callback(callback)
        checkpoint = ranks.from_main(lambda: last_checkpoint(folder))
        if checkpoint is None:
            trainer.evaluate()  # step 0 is a candidate
        else:
            step = step_of(checkpoint)
            log.info("going on from the checkpoint at step %d of %d", step, steps)
            trainer.safety.resumed_loss = history.load(checkpoint)
            bar.advance(step)
            trainer.state.global_step = step
            if config.num_evals and step % eval_every == 0 and not history.has_validated(step):
                trainer._load_from_checkpoint(str(checkpoint))  # it was stopped between the step and its validation
                trainer.evaluate()
        if not (checkpoint and history.gives_up):  # else it was killed when it had stopped early
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except (interrupt.Stopped, BatchTooLarge):
                if ranks.world_size() == 1:  # several save together, at the end of a step, or not at all
                    trainer.save_last_step()
                raise
        with interrupt.allowed():  # a stop that was asked for at the end of the last step
            pass
        if not history.has_validated(trainer.state.global_step):
            trainer.evaluate()
    steps_done = trainer.state.global_step
    student.load_state_dict(history.best)
    student.zero_grad(set_to_none=True)  # a second copy of the weights that nobody needs from here on
    del trainer
    gc.collect()  # the optimiser's moments hang on in cycles of callbacks
    done = history.to_dict()
    tokens = steps_done * seq_len * batch
    return {
        **done,
        "objective": dict(config.objective),
        "trainable": config.trainable,
        "best_step": history.best_step,
        "tokens": tokens,
        "passes": round(steps_done * batch / len(windows), 3),
        "tokens_per_second": round(tokens / max(done["seconds"], 1e-9), 1),
        "windows_at_once": config.per_device_train_batch_size,
        "trainable_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }


def share_step(config: TrainingConfig, num_ranks: int) -> TrainingConfig:
    """The same optimiser step on several ranks: its windows are shared out, so that the training stays the same.

    Args:
        config: its windows at once times accumulation are the windows of one optimiser step, on all ranks together.
        num_ranks: where they are no multiple of it, the step grows until they are.

    Returns:
        The settings of one rank, with no more windows at once than the config has.
    """
    wanted = config.per_device_train_batch_size * config.gradient_accumulation_steps
    each = -(-wanted // num_ranks)
    if each * num_ranks != wanted:
        log.warning(
            "a step of %d windows cannot be shared evenly by %d processes: it grows to %d windows",
            wanted,
            num_ranks,
            each * num_ranks,
        )
    at_once = max(n for n in range(1, min(each, config.per_device_train_batch_size) + 1) if each % n == 0)
    return config.model_copy(
        update={"per_device_train_batch_size": at_once, "gradient_accumulation_steps": each // at_once}
    )


def _unwanted_callbacks(trainer: Trainer) -> Sequence[type]:
    from transformers import PrinterCallback, ProgressCallback

    present = {type(callback) for callback in trainer.callback_handler.callbacks}
    return [kind for kind in (PrinterCallback, ProgressCallback) if kind in present]
