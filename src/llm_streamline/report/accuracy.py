"""Accuracies put together: groups of tasks as one, means over tasks, errors of paired differences."""

import math
from collections import defaultdict
from collections.abc import Sequence

from llm_streamline.evaluation.result import TaskResult
from llm_streamline.report.pair import Pair


def paired_stderr(lost: int, won: int, questions: int) -> float:
    """Standard error of the difference of two accuracies on the same questions: only flips contribute.

    A flip changes the sum by one, so the variance of a question's change is p_lost + p_won - (p_won - p_lost)^2.
    Half a question is added to each of the four outcomes (Agresti and Min 2005), so that a few questions without a
    flip do not look like certainty.
    """
    lost, won, questions = lost + 0.5, won + 0.5, questions + 2
    share = (won - lost) / questions
    return math.sqrt(((lost + won) / questions - share**2) / questions)


def collapsed(tasks: Sequence[TaskResult]) -> list[TaskResult]:
    """One entry for each group (unweighted mean over its tasks), the other tasks as they are; order of appearance."""
    groups: dict[str, list[TaskResult]] = defaultdict(list)
    for task in tasks:
        groups[task.group or task.name].append(task)
    return [_group_mean(name, members) if len(members) > 1 else members[0] for name, members in groups.items()]


def _group_mean(name: str, members: list[TaskResult]) -> TaskResult:
    def mean(key: str) -> float | None:
        values = [getattr(task, key) for task in members]
        return None if None in values else sum(values) / len(values)

    def stderr(key: str) -> float | None:
        values = [getattr(task, key) for task in members]
        return None if None in values else math.sqrt(sum(v * v for v in values)) / len(values)

    return members[0].model_copy(
        update={
            "name": name,
            "num_items": sum(task.num_items for task in members),
            "acc": mean("acc"),
            "acc_norm": mean("acc_norm"),
            "chance": mean("chance"),
            "acc_stderr": stderr("acc_stderr"),
            "acc_norm_stderr": stderr("acc_norm_stderr"),
            "metrics": (),
            "subtasks": {},
        }
    )


def mean_accuracies(pair: Pair) -> tuple[float, float, float, float | None] | None:
    """Accuracy of the original and of the model, chance, and the standard error of the difference.

    Unweighted means over the tasks that both models were scored on; a group counts once. None without such a task.
    """
    afters = {task.name: task for task in collapsed(pair.after.tasks) if task.acc is not None}
    befores = {task.name: task for task in collapsed(pair.before.tasks) if task.acc is not None} if pair.before else {}
    names = [name for name in afters if name in befores]
    if not names:
        return None
    flips = {s.task: s for s in pair.both.stability if s.metric == "acc"} if pair.both else {}
    variances = []
    for name in names:
        if name in flips:
            variances.append(paired_stderr(flips[name].tf, flips[name].ft, flips[name].num_questions) ** 2)
        elif befores[name].acc_stderr is not None and afters[name].acc_stderr is not None:
            variances.append(befores[name].acc_stderr ** 2 + afters[name].acc_stderr ** 2)
    stderr = math.sqrt(sum(variances)) / len(names) if len(variances) == len(names) else None
    before = sum(befores[name].acc for name in names) / len(names)
    after = sum(afters[name].acc for name in names) / len(names)
    return before, after, sum(afters[name].chance or 0.0 for name in names) / len(names), stderr
