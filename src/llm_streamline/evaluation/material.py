"""What an evaluation needs before any model runs: texts and questions, found and checked early."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_streamline.data.spec import TextSpec, parse_spec
from llm_streamline.data.text import open_text, read_whole_text
from llm_streamline.data.windows import Windows
from llm_streamline.errors import ConfigError, TaskError
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.items import ChoiceTask, is_choice_file, read_choice_file, with_examples
from llm_streamline.evaluation.passages import continuation_task, texts_of_windows
from llm_streamline.evaluation.perplexity import ScoredText, packed_text, scored_text
from llm_streamline.evaluation.tasks import check_task_names, require_lm_eval
from llm_streamline.logs import get_logger
from llm_streamline.runtime import package_versions

DEFAULT_CONTEXT = 1024
_CONTINUATION = "continuation"
_CHARACTERS_PER_TOKEN = 32  # more than running text ever has


@dataclass
class Material:
    """Texts and questions of one evaluation.

    `windows` are packed windows made elsewhere (held-out text of a run), by name; they are scored beside the texts of
    the config.
    """

    config: EvaluationConfig
    windows: Mapping[str, Windows] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    choice_tasks: list[ChoiceTask] = field(default_factory=list)
    harness_tasks: list[str] = field(default_factory=list)

    @property
    def harness_version(self) -> dict[str, str]:
        """The version of lm-eval by its name, if it scores any of the tasks."""
        used = self.harness_tasks or (self.choice_tasks and self.config.scorer == "lm-eval")
        return package_versions(("lm_eval",)) if used else {}

    def scored_texts(self, tokenizer, positions: int | None) -> list[ScoredText]:
        """Cut all texts into windows for one tokenizer.

        Args:
            tokenizer: the model's.
            positions: most tokens the model reads at once; None: no limit.

        Raises:
            ConfigError: a window is longer than the model's positions.
            TextError: a text is too short to be scored.
        """
        context = self.config.context or min(DEFAULT_CONTEXT, positions or DEFAULT_CONTEXT)
        found = [packed_text(name, packed, tokenizer) for name, packed in self.windows.items()]
        longest = max([one.context for one in found] + ([context] if self.texts else []), default=0)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"a window of {longest} tokens is longer than the model's {positions} positions; "
                f"ask for a context of {positions} at most."
            )
        limits = (context, self.config.stride, self.config.tokens)
        return found + [scored_text(name, text, tokenizer, *limits) for name, text in self.texts.items()]


def gather(config: EvaluationConfig, tokenizer=None, windows: Mapping[str, Windows] | None = None) -> Material:
    """Read texts and questions, and check the names of tasks.

    Args:
        config: what to measure.
        tokenizer: needed only to read a `continuation` task out of `windows`.
        windows: held-out windows of a run, by name.

    Raises:
        TextError, TaskError, MissingExtraError: something asked for is not there or cannot be used.
    """
    _refuse_twins([*(windows or {}), *config.perplexity])
    material = Material(config, windows or {})
    for spec in config.perplexity:
        material.texts[spec] = _text(spec, config.tokens)
    for name in config.tasks:
        if is_continuation(name):
            task = _continuation(name, config, tokenizer, material.windows)
        elif _is_local(name):
            task = read_choice_file(name)
        else:
            material.harness_tasks.append(name)
            continue
        if task.name in {other.name for other in material.choice_tasks}:
            raise TaskError(f"two tasks are named '{task.name}'; rename one of the files.")
        whole = with_examples(task, config.num_fewshot)
        material.choice_tasks.append(whole.first(config.limit))
        _tell_of_lost_subtasks(whole, material.choice_tasks[-1])
    _check_harness(config, material.harness_tasks)
    return material


def _tell_of_lost_subtasks(whole: ChoiceTask, asked: ChoiceTask) -> None:
    """Warn where a limit leaves out whole subtasks, as it does with a file that is sorted by them."""
    there, left = ({item.subtask for item in task.items} for task in (whole, asked))
    if len(left) < len(there):
        get_logger().warning(
            "%s: the first %d of %d questions are of %d of its %d subtasks; a file in random order asks of more",
            whole.name,
            len(asked.items),
            len(whole.items),
            len(left),
            len(there),
        )


def check_config(config: EvaluationConfig) -> None:
    """Refuse what can be refused at once, before any model is loaded; texts are probed, not read.

    Raises:
        ConfigError, TextError, TaskError, MissingExtraError: something asked for is not there or cannot be used.
    """
    if config.gate and not config.generation:
        raise ConfigError("the gate judges what the models write; it cannot be asked for without the generation check.")
    _refuse_twins(config.perplexity)
    names = [name for name in config.tasks if not is_continuation(name)]
    for spec in (*config.perplexity, *(name.partition(":")[2] for name in config.tasks if is_continuation(name))):
        if spec:
            open_text(_checked_spec(spec, config.tokens))
    for name in names:
        if _is_local(name):
            with_examples(read_choice_file(name), config.num_fewshot)
    _check_harness(config, [name for name in names if not _is_local(name)])


def _check_harness(config: EvaluationConfig, names: Sequence[str]) -> None:
    if names:
        check_task_names(names)
    elif config.tasks and config.scorer == "lm-eval":
        require_lm_eval()


def _refuse_twins(names: Sequence[str]) -> None:
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise ConfigError(f"the text '{twice[0]}' is asked for twice.")


def is_continuation(name: str) -> bool:
    """Whether a task's name is `continuation` or `continuation:TEXT`."""
    return name.partition(":")[0] == _CONTINUATION


def _is_local(name: str) -> bool:
    if not is_choice_file(name) and Path(name).is_file():
        raise TaskError(f"{name} is no multiple-choice file: those end in .jsonl or .jsonl.gz.")
    return is_choice_file(name)


def _checked_spec(spec: str, tokens: int | None) -> TextSpec:
    parsed = parse_spec(spec)
    if parsed.kind == "hub" and tokens is None:
        raise ConfigError(f"say how many tokens of the data set '{spec}' to take (--tokens).")
    return parsed


def _text(spec: str, tokens: int | None) -> str:
    """Read a text for perplexity; of what is long or endless only as much as is sure to give the tokens."""
    parsed = _checked_spec(spec, tokens)
    if parsed.kind == "files" or tokens is None:
        return read_whole_text(parsed)
    wanted, pieces = tokens * _CHARACTERS_PER_TOKEN, []
    for document in open_text(parsed).documents():
        pieces.append(document.text)
        wanted -= len(document.text)
        if wanted < 0:
            break
    return "\n\n".join(pieces)


def _continuation(name: str, config: EvaluationConfig, tokenizer, windows: Mapping[str, Windows]) -> ChoiceTask:
    """Make the task of the text it names, else of the run's windows, else of the first text, else of `builtin`."""
    _, _, spec = name.partition(":")
    if not spec and windows and tokenizer is not None:
        texts: Sequence[str] = texts_of_windows(next(iter(windows.values())), tokenizer)
    else:
        spec = spec or (config.perplexity[0] if config.perplexity else "builtin")
        texts = (document.text for document in open_text(spec).documents())
    wanted = config.limit and config.limit + config.num_fewshot
    source = parse_spec(spec).source if spec else ""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).name.split(".")[0]).strip("-")
    label = f"{_CONTINUATION}:{stem}" if ":" in name and stem else _CONTINUATION
    return continuation_task(texts, name=label, num_items=wanted, seed=config.seed)
