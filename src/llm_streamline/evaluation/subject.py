"""One model under evaluation: its measurements, stage by stage, alone and beside the original."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llm_streamline import ranks
from llm_streamline.errors import ConfigError, NumericsError
from llm_streamline.evaluation.answers import Answers, answers_of_rows, answers_of_samples
from llm_streamline.evaluation.choices import score_task
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.generation import PROMPTS, generate_texts
from llm_streamline.evaluation.logits import LogitReader, max_positions
from llm_streamline.evaluation.material import Material
from llm_streamline.evaluation.outcome import as_lines, item_rows, task_result
from llm_streamline.evaluation.perplexity import ScoredText, WindowLosses, perplexity_result, read_windows
from llm_streamline.evaluation.result import GenerationResult, PerplexityResult, SizeResult, TaskResult
from llm_streamline.evaluation.size import model_size
from llm_streamline.evaluation.speed import SpeedSetup, Timings, compare_speed, speed_result, time_in_turns
from llm_streamline.evaluation.tasks import run_choice_task, run_harness
from llm_streamline.memory_limits import told_in_a_sentence
from llm_streamline.sources import LoadedModel

_SPEED_PROMPT_TOKENS = 256


class Clock:
    """Adds up the seconds of each stage."""

    def __init__(self):
        self.start = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside the block as part of the stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begin


@dataclass
class Subject:
    """One model under evaluation, and what was found of it so far."""

    name: str
    loaded: LoadedModel
    reader: LogitReader
    size: SizeResult
    texts: list[ScoredText]
    losses: dict[str, WindowLosses] = field(default_factory=dict)
    perplexity: tuple[PerplexityResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    answers: dict[str, Answers] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)  # name of a log file -> its content
    generation: GenerationResult | None = None

    @property
    def model(self):
        """The model itself."""
        return self.loaded.model

    @property
    def positions(self) -> int | None:
        """Most tokens the model reads at once; None: no limit."""
        return max_positions(self.loaded.model)


def name_of(loaded: LoadedModel, taken: set[str]) -> str:
    """A name that is fit for a folder and not taken yet: the last part of what the user called the model."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(loaded.source.spec)).name).strip("-.") or "model"
    names = [stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def make_subject(name: str, loaded: LoadedModel, material: Material) -> Subject:
    """Take a model up: its size, and the texts cut by its tokenizer.

    Raises:
        NumericsError: it yields not-a-number at once.
        ConfigError, TextError: the texts cannot be cut as asked.
    """
    try:
        reader = LogitReader(loaded.model)
        size = model_size(loaded.model)
    except NumericsError as error:
        raise NumericsError(f"{loaded.source.spec}: {error}") from None
    texts = material.scored_texts(loaded.tokenizer, max_positions(loaded.model))
    return Subject(name, loaded, reader, size, texts)


def measure_texts(subject: Subject, base: Subject | None, config: EvaluationConfig, clock: Clock) -> dict:
    """Take perplexities of the model, of the original on the way, and their divergences by text."""
    divergences, limits = {}, {"batch_size": config.batch_size, "batch_tokens": config.batch_tokens}
    same = {text.name for text in subject.texts} & _same_texts(subject, base)
    with clock.stage("perplexity"):
        for text in subject.texts:
            if text.name in same and config.divergence:
                subject.losses[text.name], base.losses[text.name], divergences[text.name] = read_windows(
                    text, subject.reader, base.reader, **limits
                )
            else:
                subject.losses[text.name], _, _ = read_windows(text, subject.reader, **limits)
        for text in base.texts if base is not None else ():
            if text.name not in base.losses:
                base.losses[text.name], _, _ = read_windows(text, base.reader, **limits)
    for one in (subject, base):
        if one is not None:
            one.perplexity = tuple(perplexity_result(t, one.losses[t.name], one.size.dtype) for t in one.texts)
    return {"same": same, "divergences": divergences}


def _same_texts(subject: Subject, base: Subject | None) -> set[str]:
    """Names of the texts whose windows are the same for both models, token by token."""
    if base is None or subject.reader.vocab_size != base.reader.vocab_size:
        return set()
    hashes = {text.name: text.data_hash for text in base.texts}
    return {text.name for text in subject.texts if hashes.get(text.name) == text.data_hash}


def measure_tasks(subject: Subject, material: Material, clock: Clock) -> None:
    """Score all tasks of one model; keep results, per-item logs and answers."""
    config, found = material.config, []
    with clock.stage("tasks"):
        for task in material.choice_tasks:
            if config.scorer == "lm-eval":
                run = partial(
                    run_choice_task,
                    subject.model,
                    subject.loaded.tokenizer,
                    task,
                    batch_size=config.batch_size,
                    max_length=subject.positions,
                    seed=config.seed,
                )
                outcome = ranks.from_main(run)  # the harness shares nothing: one rank runs it
                update = {"limit": config.limit, "num_fewshot": config.num_fewshot}
                result, rows = outcome.result.model_copy(update=update), list(outcome.samples)
                answers = _answers(rows, result)
            else:
                scored = score_task(
                    task,
                    subject.reader,
                    subject.loaded.tokenizer,
                    max_length=subject.positions,
                    batch_size=config.batch_size,
                    batch_tokens=config.batch_tokens,
                )
                result = task_result(task, scored, limit=config.limit, num_fewshot=config.num_fewshot)
                rows = item_rows(task, scored)
                answers = answers_of_rows(list(zip(rows, range(1, len(rows) + 1), strict=True)), task.name)
            found.append(_keep(subject, result, rows, answers))
        if material.harness_tasks:
            run = partial(
                run_harness,
                subject.model,
                subject.loaded.tokenizer,
                material.harness_tasks,
                limit=config.limit,
                num_fewshot=config.num_fewshot or None,
                batch_size=config.batch_size,
                max_length=subject.positions,
                seed=config.seed,
            )
            outcomes = ranks.from_main(run)
            taken = {task.name for task in material.choice_tasks}
            for outcome in outcomes:
                name = outcome.result.name
                result = outcome.result.model_copy(update={"name": f"{name}-lm-eval" if name in taken else name})
                rows = list(outcome.samples)
                found.append(_keep(subject, result, rows, _answers(rows, result)))
    subject.tasks = tuple(found)


def _answers(rows: list[dict], result: TaskResult) -> Answers | None:
    """Answers in the harness's rows; None for a task that is not multiple choice with right and wrong answers."""
    if result.acc is None or not rows or len(rows[0]["arguments"]) < 2:
        return None
    if any(row.get("acc") not in (0, 1) for row in rows):
        return None  # truthfulqa_mc2 gives shares of probability
    return answers_of_samples(list(zip(rows, range(1, len(rows) + 1), strict=True)), result.name, result.name)


def _keep(subject: Subject, result: TaskResult, rows: list[dict], answers: Answers | None) -> TaskResult:
    prefix = "samples_" if result.scorer == "lm-eval" else ""
    file = f"items/{subject.name}/{prefix}{re.sub(r'[^A-Za-z0-9._-]+', '-', result.name)}.jsonl"
    subject.logs[file] = as_lines(rows)
    if answers is not None:
        subject.answers[result.name] = answers
    return result.model_copy(update={"items_file": file})


def measure_generation(subject: Subject, config: EvaluationConfig, clock: Clock) -> None:
    """Let the model write, if the config asks for it."""
    if not config.generation:
        return
    with clock.stage("generation"):
        run = partial(
            generate_texts,
            subject.model,
            subject.loaded.tokenizer,
            config.prompts or PROMPTS,
            max_new_tokens=config.max_new_tokens,
            max_positions=subject.positions,
            samples=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
        )
        subject.generation = ranks.from_main(run)


def speed_setup(subjects: Sequence[Subject], config: EvaluationConfig) -> SpeedSetup | None:
    """Return what the speed measurement will time; None if it is not asked for.

    Raises:
        ConfigError: prompt and new tokens do not fit the models' positions.
    """
    if not config.speed:
        return None
    room = min(one.positions or 10**9 for one in subjects) - config.speed_new_tokens
    prompt_tokens = config.speed_prompt_tokens or min(_SPEED_PROMPT_TOKENS, room)
    if not 1 <= prompt_tokens <= room:
        raise ConfigError(
            f"the speed measurement needs {max(1, prompt_tokens) + config.speed_new_tokens} positions, the model has "
            f"{room + config.speed_new_tokens}; ask for fewer prompt or new tokens."
        )
    return SpeedSetup(config.speed_batch_size, prompt_tokens, config.speed_new_tokens, config.speed_rounds, config.seed)


def measure_speed(subject: Subject, base: Subject | None, setup: SpeedSetup | None, clock: Clock) -> tuple:
    """Time the model, and the original in turns with it.

    Returns:
        The results of the model and the original, and their comparison; None for each that there is not.
    """
    if setup is None:
        return None, None, None
    both = [subject] if base is None else [subject, base]
    with clock.stage("speed"):
        timings = ranks.from_main(lambda: _timed([one.model for one in both], setup))  # the others rest
    results = [speed_result(one, setup) for one in timings]
    if base is None:
        return results[0], None, None
    return results[0], results[1], compare_speed(timings[1], timings[0], base.size, subject.size)


def _timed(models: list, setup: SpeedSetup) -> list[Timings]:
    """Time in turns; a batch that does not fit is not halved: that would be another measurement."""
    way_out = "lower evaluation.speed_batch_size or speed_prompt_tokens, or leave it out (evaluation.speed: false)"
    with told_in_a_sentence("the speed measurement", way_out, can_stream=False):
        return time_in_turns(models, setup)
