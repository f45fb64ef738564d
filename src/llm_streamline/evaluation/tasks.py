"""Tasks through lm-evaluation-harness (extra `tasks`): any task, group or YAML folder it knows, on a model in memory.

Local multiple-choice files run as tasks of its own kind, written as YAML beside their questions, so that every number
of our light scorer can be checked against it.
"""

import copy
import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llm_streamline.errors import MissingExtraError, NumericsError, StreamlineError, TaskError
from llm_streamline.evaluation.answers import group_of
from llm_streamline.evaluation.items import ChoiceTask, near_names
from llm_streamline.evaluation.outcome import share_stderr
from llm_streamline.evaluation.result import MetricResult, TaskResult
from llm_streamline.logs import get_logger
from llm_streamline.memory_limits import BatchTooLarge, free_memory, no_room_for, out_of_memory

_ROWS_AT_ONCE = 8
_LOCAL_PREFIX = "local_"  # keeps a local file's task apart from the harness's task of that name
log = get_logger()


@dataclass(frozen=True)
class HarnessTask:
    """One task's outcome: its result record, and a row for each question as --log_samples would write it."""

    result: TaskResult
    samples: tuple[dict, ...]


def require_lm_eval() -> None:
    """Raise MissingExtraError unless lm-evaluation-harness is installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            'tasks by name need lm-evaluation-harness: pip install "llm-streamline[tasks]". '
            "Local multiple-choice files (.jsonl) and `continuation` need nothing more."
        ) from None


def check_task_names(names: Sequence[str]) -> None:
    """Check names before any model is loaded: tasks, groups or tags of the harness, or folders with YAML tasks.

    Raises:
        MissingExtraError: the harness is not installed.
        TaskError: a name is unknown (near names are offered), or a folder holds no task.
    """
    require_lm_eval()
    for folder in (name for name in names if Path(name).is_dir()):
        _tasks_in(folder)
    plain = [name for name in names if not Path(name).is_dir()]
    if not plain:
        return
    known = _manager().all_tasks
    for name in plain:
        if name not in known:
            raise TaskError(
                f"no task '{name}'.{near_names(name, known)} Tasks are names, groups and YAML folders of lm-eval, "
                "multiple-choice files (.jsonl, .jsonl.gz), or `continuation`."
            )


def _tasks_in(folder: str) -> list[str]:
    """Names of the YAML tasks in a folder."""
    with _quiet():
        found = list(_manager([folder], defaults=False).all_subtasks)
    if not found:
        raise TaskError(f"{folder} holds no YAML task that lm-eval can read.")
    return found


def _manager(include: Sequence[str] = (), defaults: bool = True):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include) or None, include_defaults=defaults)


def run_harness(
    model,
    tokenizer,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> list[HarnessTask]:
    """Run tasks of the harness on a model in memory.

    Args:
        model: the model; it is handed over, not loaded again.
        tokenizer: its tokenizer.
        names: tasks, groups, tags, or folders whose YAML tasks are all run.
        limit: questions of each task, from the first.
        num_fewshot: worked examples; None: as each task says.
        batch_size: rows in a forward pass; None: 8. Where they do not fit into memory the tasks start over with half.
        max_length: most tokens read at once; None: as the model's config says.
        seed: of everything that draws.

    Raises:
        MissingExtraError, TaskError, NumericsError: see `check_task_names`; also whatever the harness cannot run (a
            data set that cannot be had or is empty, a field or template that is wrong), a gold answer out of range,
            and log-likelihoods that are not finite.
        OutOfMemoryError: not even one row fits.
    """
    check_task_names(names)
    folders = [name for name in names if Path(name).is_dir()]
    inside = [task for folder in folders for task in _tasks_in(folder)]
    wanted = [name for name in names if name not in folders] + inside
    manager = _manager(folders, defaults=len(folders) < len(names))
    return _run(model, tokenizer, wanted, manager, limit, num_fewshot, batch_size, max_length, seed)


def run_choice_task(model, tokenizer, task: ChoiceTask, **options: Any) -> HarnessTask:
    """Run local multiple-choice questions through the harness.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        task: the questions, with worked examples in their contexts if there should be any.
        options: `batch_size`, `max_length`, `seed` as of `run_harness`.
    """
    require_lm_eval()
    with _as_yaml(task) as folder:
        manager = _manager([str(folder)], defaults=False)
        options = {"limit": None, "batch_size": None, "max_length": None, "seed": 0} | options
        (found,) = _run(model, tokenizer, [_LOCAL_PREFIX + task.name], manager, num_fewshot=None, **options)
    # group and name are the file's, not the harness's
    result = found.result.model_copy(update={"name": task.name, "group": None, "data_hash": task.data_hash})
    return HarnessTask(result, found.samples)


@contextmanager
def _as_yaml(task: ChoiceTask) -> Iterator[Path]:
    """Write the task as the harness wants it, YAML and questions, in a folder that is removed afterwards."""
    strip = len(task.delimiter)
    many_contexts = not all(item.shared_context for item in task.items)
    rows = []
    for item in task.items:
        continuations = [text[strip:] for text in item.continuations]
        if many_contexts and len(set(continuations)) > 1:
            raise TaskError(f"task {task.name}: '{item.id}' varies contexts and continuations; the harness cannot.")
        rows.append({"id": item.id, "gold": item.gold, "contexts": item.contexts, "continuations": continuations})
    with tempfile.TemporaryDirectory(prefix="llm-streamline-") as name:
        folder = Path(name)
        data = folder / "questions.jsonl"
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        settings = {
            "task": _LOCAL_PREFIX + task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "gold" if many_contexts else "{{contexts[0]}}",
            "doc_to_choice": "contexts" if many_contexts else "continuations",
            "doc_to_target": "{{continuations[0]}}" if many_contexts else "gold",
            "target_delimiter": task.delimiter,
            "num_fewshot": 0,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in (("acc",) if many_contexts else ("acc", "acc_norm"))
            ],
        }
        (folder / "task.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        yield folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the harness's remarks and the bars of the data sets that it prepares; errors still show."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _run(model, tokenizer, names, manager, limit, num_fewshot, batch_size, max_length, seed) -> list[HarnessTask]:
    """Run tasks, and all of them again with half as many rows at once when memory ends: the harness cannot go on."""
    rows = batch_size or _ROWS_AT_ONCE
    while True:
        try:
            return _run_once(model, tokenizer, names, manager, limit, num_fewshot, rows, max_length, seed)
        except BatchTooLarge as problem:
            if rows == 1:
                way_out = "use fewer worked examples (--num-fewshot)"
                raise out_of_memory(f"the tasks {', '.join(names)}", str(problem), way_out) from None
            log.warning(
                "out of memory in %s with %d rows at once; starting over with %d", ", ".join(names), rows, rows // 2
            )
        rows //= 2
        free_memory()  # out here: the error that held on to the tensors is gone


def _run_once(model, tokenizer, names, manager, limit, num_fewshot, rows, max_length, seed) -> list[HarnessTask]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        wrapped = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # the harness gives it a pad token
            batch_size=rows,
            max_length=max_length,
            # its default is the model's dtype: a bfloat16 log-softmax is good for two digits
            softmax_dtype=torch.float32,
        )
    wrapped.loglikelihood = partial(wrapped.loglikelihood, disable_tqdm=True)  # progress is told by our own bar
    try:
        with _quiet(), no_room_for(rows, "rows"):
            found = simple_evaluate(
                model=wrapped,
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (StreamlineError, BatchTooLarge):
        raise
    except Exception as error:
        # Of a data set that cannot be downloaded, is empty or lacks a field that the task's YAML names, of a template
        # with a mistake in it: the harness raises what it happens to meet, StopIteration and jinja2's errors among it.
        told = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": .")
        raise TaskError(f"lm-eval could not run {', '.join(names)} ({told}).") from error
    groups = {task: group for group, tasks in found.get("group_subtasks", {}).items() for task in tasks}
    return [_outcome(name, found, groups.get(name), limit) for name in found["samples"]]


def _outcome(name: str, found: dict, group: str | None, limit: int | None) -> HarnessTask:
    samples = tuple(found["samples"][name])
    metrics, errors = {}, {}
    for key, value in found["results"][name].items():
        metric, _, _filter = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            target = errors if metric.endswith("_stderr") else metrics
            target.setdefault(metric.removesuffix("_stderr"), float(value))
    num_items = len({sample["doc_id"] for sample in samples})
    metrics = {key: value for key, value in metrics.items() if key not in ("sample_len", "alias")}
    if bad := [key for key, value in metrics.items() if not math.isfinite(value)]:
        raise NumericsError(f"task {name}: lm-eval's {bad[0]} is not finite; the model yields not-a-number.")
    for sample in samples:
        scores = [response[0] for response in sample["filtered_resps"] if isinstance(response, (list, tuple))]
        if not all(math.isfinite(score) for score in scores if isinstance(score, float)):
            raise NumericsError(f"task {name}, question {sample['doc_id']}: a log-likelihood is not finite.")
        # the harness itself only logs this, and counts the question as answered wrongly
        gold = sample["target"]
        if type(gold) is int and len(scores) > 1 and not 0 <= gold < len(scores):
            raise TaskError(
                f"task {name}, question {sample['doc_id']}: gold is {gold}, but there are {len(scores)} choices "
                "(0 is the first)."
            )
    errors |= {key: share_stderr(metrics[key], num_items) for key in ("acc", "acc_norm") if key in metrics}
    errors = {key: value for key, value in errors.items() if value is not None and math.isfinite(value)}
    known = ("acc", "acc_norm")
    result = TaskResult(
        name=name,
        group=group_of(name) or group,  # all subjects of MMLU are one group, not four
        scorer="lm-eval",
        num_items=num_items,
        limit=limit,
        num_fewshot=int(found.get("n-shot", {}).get(name) or 0),
        acc=metrics.get("acc"),
        acc_stderr=errors.get("acc"),
        acc_norm=metrics.get("acc_norm"),
        acc_norm_stderr=errors.get("acc_norm"),
        metrics=tuple(
            MetricResult(name=key, value=value, stderr=errors.get(key))
            for key, value in sorted(metrics.items())
            if key not in known
        ),
        data_hash=hashlib.sha256(" ".join(str(sample["doc_hash"]) for sample in samples).encode()).hexdigest(),
    )
    return HarnessTask(result, samples)
