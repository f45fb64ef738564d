"""From scored questions to a task's record, and to the rows of its per-item log."""

import json
import math
from collections.abc import Sequence

from llm_streamline.evaluation.choices import ScoredItem
from llm_streamline.evaluation.items import ChoiceTask
from llm_streamline.evaluation.result import TaskResult


def task_result(
    task: ChoiceTask, scored: Sequence[ScoredItem], *, limit: int | None = None, num_fewshot: int = 0
) -> TaskResult:
    """Sum up one task: accuracies with standard errors (binomial, n - 1), chance, and acc by subtask."""
    right = [one.prediction == one.item.gold for one in scored]
    has_norm = all(one.item.shared_context for one in scored)
    right_norm = [one.prediction_norm == one.item.gold for one in scored] if has_norm else []
    subtasks: dict[str, list[bool]] = {}
    for one, hit in zip(scored, right, strict=True):
        if one.item.subtask is not None:
            subtasks.setdefault(one.item.subtask, []).append(hit)
    return TaskResult(
        name=task.name,
        scorer="light",
        num_items=len(scored),
        limit=limit,
        num_fewshot=num_fewshot,
        acc=_share(right),
        acc_stderr=share_stderr(_share(right), len(right)),
        acc_norm=_share(right_norm) if has_norm else None,
        acc_norm_stderr=share_stderr(_share(right_norm), len(right_norm)) if has_norm else None,
        chance=math.fsum(1 / len(one.loglikelihoods) for one in scored) / len(scored),
        subtasks={name: _share(hits) for name, hits in sorted(subtasks.items())},
        data_hash=task.data_hash,
    )


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def share_stderr(share: float, count: int) -> float | None:
    """Return the standard error of a share of `count` independent items, as lm-eval's; None with one item."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def item_rows(task: ChoiceTask, scored: Sequence[ScoredItem]) -> list[dict]:
    """Return one row for each question, as the per-item log holds them.

    `loglikelihood` (nats), `tokens`, `bytes` and `chars` are lists over the choices; `chars` and `bytes` leave out the
    leading space; `chars` is empty where the choices are contexts, because there acc_norm is not defined.
    """
    rows = []
    for one in scored:
        row = {"task": task.name, "id": one.item.id}
        if one.item.subtask is not None:
            row["subtask"] = one.item.subtask
        rows.append(
            row
            | {
                "question": one.item.question,
                "gold": one.item.gold,
                "prediction": one.prediction,
                "prediction_norm": one.prediction_norm,
                "correct": one.prediction == one.item.gold,
                "loglikelihood": list(one.loglikelihoods),
                "tokens": list(one.num_tokens),
                "chars": list(one.num_chars) if one.item.shared_context else [],
                "bytes": list(one.num_bytes),
            }
        )
    return rows


def as_lines(rows: Sequence[dict]) -> str:
    """Return rows as JSON lines; what JSON does not know (in samples of lm-eval) as its text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
