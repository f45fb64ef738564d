"""What a recipe may add under `training.arguments`: passed on, or refused before the measurements."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from llm_streamline.config import TrainingConfig
from llm_streamline.errors import ConfigError, MissingExtraError
from llm_streamline.training.arguments import _DECIDED, _ELSEWHERE, check_arguments, training_arguments

CPU = torch.device("cpu")


def arguments_of(wishes, **settings):
    return training_arguments(TrainingConfig(arguments=wishes, **settings), 10, 2, Path("work"), 3, CPU)


def check(wishes):
    check_arguments(TrainingConfig(arguments=wishes), CPU)


def test_what_is_not_settled_is_passed_on():
    found = arguments_of({"adam_epsilon": 1e-6, "data_seed": 7, "dataloader_num_workers": 2})
    assert (found.adam_epsilon, found.data_seed, found.dataloader_num_workers) == (1e-6, 7, 2)
    assert (found.seed, found.max_steps, found.output_dir) == (3, 10, "work")


def test_the_cosine_ends_where_the_recipe_says_and_another_schedule_takes_settings_of_its_own():
    assert arguments_of({}, learning_rate=1e-3, min_learning_rate=2e-4).lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert not arguments_of({"lr_scheduler_type": "linear"}).lr_scheduler_kwargs
    wishes = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}
    assert arguments_of(wishes).lr_scheduler_kwargs == {"power": 2.0}


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"learning_speed": 3}, "learning_speed"),
        ({"learning_rate": 3}, "use training.learning_rate"),
        ({"max_steps": 3}, "use training.tokens"),
        ({"output_dir": "/elsewhere"}, "use the option -o"),
        ({"save_strategy": "no"}, "decided by the run itself; leave it out"),
        ({"adam_epsilon": "big"}, "adam_epsilon cannot be 'big': Input should be a valid number"),
        ({"data_seed": 1.5}, "data_seed cannot be 1.5"),
        ({"optim": "nope"}, "nope is not a valid"),
        ({"lr_scheduler_type": "nope"}, "nope is not a valid"),
        ({"report_to": "nonsense"}, "nonsense is not supported"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(wishes, said):
    with pytest.raises(ConfigError, match=r"^training\.arguments: ") as refusal:
        check(wishes)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("package", "wishes"),
    [
        ("wandb", {"report_to": "wandb"}),
        ("bitsandbytes", {"optim": "adamw_bnb_8bit"}),
        ("deepspeed", {"deepspeed": {"zero_optimization": {"stage": 2}}}),
    ],
)
def test_what_is_not_installed_is_named(package, wishes):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(MissingExtraError, match=package):
        check(wishes)


def test_nothing_is_written_by_the_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check({"logging_steps": 5})
    assert not list(tmp_path.iterdir())


def test_the_names_that_are_refused_are_the_trainers():
    """But for one that newer versions took away."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {*_ELSEWHERE, *_DECIDED} - known <= {"warmup_ratio"}
