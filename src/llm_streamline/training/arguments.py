"""Our settings in the Trainer's words, and what a recipe may add to them under `training.arguments`."""

from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from llm_streamline import ranks
from llm_streamline.config import TrainingConfig
from llm_streamline.errors import ConfigError, MissingExtraError

_SAME_NAME = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
_ELSEWHERE = {  # what the recipe or the command has a word of its own for
    **{name: f"training.{name}" for name in (*_SAME_NAME, "gradient_checkpointing", "torch_compile")},
    **dict.fromkeys(("max_steps", "num_train_epochs"), "training.tokens"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), "training.warmup_ratio"),
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"), "training.num_evals"),
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), "training.autocast"),
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config"), "accelerate launch (docs/distributed.md)"),
    "per_device_eval_batch_size": "training.per_device_train_batch_size",
    "seed": "the recipe's seed",
    "use_cpu": "the recipe's device",
    "output_dir": "the option -o",
    "push_to_hub": "llm-streamline push",
}
_DECIDED = (  # what resuming, the kept state or the student's own loss stand on
    "activation_checkpointing",
    "auto_find_batch_size",
    "dataloader_drop_last",
    "enable_jit_checkpoint",
    "ignore_data_skip",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "neftune_noise_alpha",
    "remove_unused_columns",
    "resume_from_checkpoint",
    "save_on_each_node",
    "save_only_model",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "train_sampling_strategy",
    "use_liger_kernel",
)


class InPlaceArguments(TrainingArguments):
    """Settings for a student that is already where it is to be trained.

    In one process the Trainer would move it to the first device, and copy it to every other one for each batch
    (DataParallel).
    """

    place: ClassVar[torch.device | None] = None  # set on one object; None leaves the choice to the Trainer

    @property
    def device(self) -> torch.device:
        """Where batches go and losses come from."""
        chosen = super().device
        return self.place or chosen

    @property
    def place_model_on_device(self) -> bool:
        """Whether the Trainer moves the model: never."""
        return False

    @property
    def n_gpu(self) -> int:
        """How many devices the Trainer may copy the model to: the one where it is, or none."""
        return min(super().n_gpu, 1)


def training_arguments(
    config: TrainingConfig, num_steps: int, eval_every: int, folder: Path, seed: int, device: torch.device
) -> TrainingArguments:
    """Translate our settings; everything is counted in optimiser steps (specifications D7).

    Raises:
        ConfigError: if `config.arguments` holds something that TrainingArguments does not know or accept, or that is
            settled elsewhere, or if ZeRO 3 is asked for.
        MissingExtraError: if it names something that is not installed.
    """
    _check_wishes(config.arguments)
    settings = {
        **{name: getattr(config, name) for name in _SAME_NAME},
        "output_dir": str(folder),
        "max_steps": num_steps,
        "lr_scheduler_type": "cosine_with_min_lr",
        # as a share: the optimiser that DeepSpeed wraps does not tell the scheduler its rate
        "lr_scheduler_kwargs": {"min_lr_rate": config.min_learning_rate / config.learning_rate},
        "warmup_steps": round(config.warmup_ratio * num_steps),
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "eval_strategy": "steps" if config.num_evals else "no",
        "eval_steps": eval_every,
        "save_strategy": "steps",
        "save_steps": eval_every,
        "save_total_limit": None,  # `keep_newest` goes by steps, the Trainer by the files' times
        "logging_steps": max(1, num_steps // 200),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device.type == "cpu",
        "ddp_find_unused_parameters": config.heals,  # an objective may miss what is healed
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
    }
    if "lr_scheduler_type" in config.arguments:
        del settings["lr_scheduler_kwargs"]  # another schedule does not know them
    try:
        arguments = InPlaceArguments(**{**settings, **config.arguments})
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"training.arguments: {problem}") from None
    except ImportError as problem:
        raise _missing(problem) from None
    if getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3:
        raise ConfigError(
            "DeepSpeed's ZeRO 3 splits the weights that are trained, which a run compares, keeps and saves whole; use "
            "zero_stage 1 or 2 (recipes/accelerate/deepspeed_zero2.yaml), or FSDP to split the original (fsdp2.yaml)"
        )
    if ranks.world_size() == 1:
        arguments.place = device
    return arguments


def check_arguments(config: TrainingConfig, device: torch.device) -> None:
    """Refuse before the measurements what the Trainer would refuse after them: its optimiser and trackers too.

    Raises:
        ConfigError, MissingExtraError: as `training_arguments`.
    """
    arguments = training_arguments(config, 1, 1, Path("checkpoints"), 0, device)  # names a folder, makes none
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except ValueError as problem:
        raise ConfigError(f"training.arguments: {problem}") from None
    except (ImportError, RuntimeError) as problem:  # the trackers' is a RuntimeError
        raise _missing(problem) from None


def _check_wishes(wishes: dict[str, Any]) -> None:
    """Refuse what is settled elsewhere, and values of another type; unknown names are left to TrainingArguments."""
    hints = get_type_hints(TrainingArguments) if wishes else {}
    for name, value in wishes.items():
        if name in _ELSEWHERE:
            raise ConfigError(f"training.arguments: {name} is settled elsewhere; use {_ELSEWHERE[name]}")
        if name in _DECIDED:
            raise ConfigError(f"training.arguments: {name} is decided by the run itself; leave it out")
        if name not in hints:
            continue
        try:
            TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as problem:
            said = problem.errors()[0]["msg"]
            raise ConfigError(f"training.arguments: {name} cannot be {value!r}: {said}") from None


def _missing(problem: Exception) -> MissingExtraError:
    said = " ".join(str(problem).split()).rstrip(".")
    return MissingExtraError(f"training.arguments names what is not installed: {said}")
