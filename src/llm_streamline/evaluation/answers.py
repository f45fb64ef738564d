"""What a model answered, question by question: our own per-item logs, and those of lm-eval and OpenCompass.

One `Answers` is one data set answered by one model. Lengths normalise log-likelihoods: a choice's NLL is minus its
log-likelihood by its tokens (our logs) or bytes (lm-eval logs hold no token counts). OpenCompass writes a field "PPL"
per choice; its Hugging Face back-end computes that as the mean cross-entropy over the tokens of prompt and choice and
does not exponentiate it, so we read it as an NLL.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_streamline.errors import NumericsError, TaskError
from llm_streamline.evaluation.result import Results

_GROUPS = ("cmmlu", "mmlu", "ceval", "agieval")  # one file for each subject; the paper averages over subjects first
_OWN_KEYS = {"id", "question", "gold", "loglikelihood", "tokens", "chars"}


@dataclass(frozen=True)
class Answer:
    """One question answered. `nll` is per choice, length-normalised, nats."""

    id: str
    question: str  # hash of the question and its choices; '' when the log does not hold them
    nll: tuple[float, ...]
    prediction: int
    correct: bool


@dataclass(frozen=True)
class Answers:
    """One data set answered by one model, in the order of the file."""

    task: str
    group: str | None
    metric: str
    length_unit: str
    items: tuple[Answer, ...]
    origin: str  # file, for messages


def question_hash(parts: Iterable[str]) -> str:
    """Return a short hash of a question's texts (contexts, then continuations)."""
    return hashlib.sha256(json.dumps(list(parts), ensure_ascii=False).encode()).hexdigest()[:16]


def group_of(task: str) -> str | None:
    """Return the group a data set's name belongs to ('lukaemon_mmlu_anatomy' -> 'mmlu'), or None."""
    match = re.search(rf"(?:^|_)({'|'.join(_GROUPS)})[-_]", task)
    return match[1] if match else None


def read_answers(path: str | Path, metric: str = "acc") -> dict[str, Answers]:
    """Read every answered data set in `path`, by its name.

    Args:
        path: a result file of `evaluate`, or the output folder it is in (the answers of its one compressed model, or of
            its only model); a per-item log (.jsonl of ours or of lm-eval's --log_samples); an OpenCompass prediction
            file (.json); or a folder of such logs of one model.
        metric: how our own logs choose an answer: 'acc' by log-likelihood, 'acc_norm' by log-likelihood per character.

    Raises:
        TaskError: nothing there, a file of none of these formats, a malformed line (named), no question in it.
        NumericsError: a score is not finite.
    """
    found: dict[str, Answers] = {}
    for file in _files(Path(path)):
        answers = _read_file(file, metric)
        if answers is None:
            continue
        if answers.task in found:
            raise TaskError(
                f"{path} holds the data set '{answers.task}' twice ({found[answers.task].origin} and {file}); "
                "name the folder of one model."
            )
        found[answers.task] = answers
    if not found:
        raise TaskError(
            f"{path} holds no per-item logs: expected a result file of `evaluate`, .jsonl files of lm-eval "
            "--log_samples, or OpenCompass prediction .json files with a PPL for each choice."
        )
    return found


def _files(path: Path) -> list[Path]:
    """The log files that `path` stands for."""
    if not path.exists():
        raise TaskError(f"no file or folder {path}.")
    for results in (path, path / "streamline" / "results.json", path / "results.json"):
        if results.is_file() and results.suffix == ".json" and (logs := _logs_of_results(results)) is not None:
            return logs
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl"))


def _logs_of_results(file: Path) -> list[Path] | None:
    """The logs of the model in a result file of ours; None when the file is something else."""
    data = _load(file.read_bytes(), str(file))
    if "models" not in data or "provenance" not in data:
        return None
    results = Results.load(file)
    models = [model for model in results.models if model.role == "model"] or list(results.models)
    if len(models) != 1:
        folders = ", ".join(str(file.parent / "items" / model.name) for model in results.models)
        raise TaskError(f"{file} holds {len(models)} models; name the items of one: {folders}.")
    return [file.parent / task.items_file for task in models[0].tasks if task.items_file]


def _read_file(file: Path, metric: str) -> Answers | None:
    """Read one file; None for a .json in a folder that is something else."""
    if file.suffix == ".json":
        data = _load(file.read_bytes(), str(file))
        return _from_opencompass(data, file) if _is_opencompass(data) else None
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append((_load(line, f"{file}, line {number}"), number))
    if not rows:
        raise TaskError(f"{file} holds no answers.")
    first = rows[0][0]
    try:
        if first.keys() >= _OWN_KEYS:
            return answers_of_rows(rows, str(file), metric)
        if "doc_id" in first and ("filtered_resps" in first or "resps" in first):
            task = re.sub(r"^samples_|_\d{4}-\d{2}-\d{2}T[\d:.\-]+$", "", file.stem)
            return answers_of_samples(rows, task, str(file))
    except _BadRow as error:
        raise TaskError(f"{file}, line {error.number}: {error.reason}.") from None
    raise TaskError(f"{file} is neither a log of `evaluate` nor of lm-eval --log_samples.")


class _BadRow(Exception):
    def __init__(self, number: int, reason: str):
        super().__init__(reason)
        self.number, self.reason = number, reason


def _load(content: bytes, where: str) -> dict:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise TaskError(f"{where}: not JSON ({error}).") from None
    if not isinstance(data, dict):
        raise TaskError(f"{where}: expected a JSON object, got {type(data).__name__}.")
    return data


def _finite(values: Iterable[Any], where: str) -> tuple[float, ...]:
    values = tuple(values)
    if not values or not all(isinstance(value, (int, float)) for value in values):
        raise TaskError(f"{where}: a choice without a score ({list(values)}).")
    if not all(math.isfinite(value) for value in values):
        raise NumericsError(f"{where}: a choice's score is not finite ({list(values)}).")
    return values


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)  # the first of equal scores, as numpy's argmax


def answers_of_rows(rows: list[tuple[dict, int]], origin: str, metric: str = "acc") -> Answers:
    """Read rows of our own logs, each with its line number; `origin` names the file in messages."""
    items = []
    for row, number in rows:
        if missing := _OWN_KEYS - row.keys():
            raise _BadRow(number, f"the field '{min(missing)}' is missing")
        likelihoods = _finite(row["loglikelihood"], f"{origin}, line {number}")
        if len(row["tokens"]) != len(likelihoods) or len(row["chars"] or likelihoods) != len(likelihoods):
            raise _BadRow(number, "the lists of the choices differ in length")
        nll = tuple(-ll / max(1, count) for ll, count in zip(likelihoods, row["tokens"], strict=True))
        scores = list(likelihoods)
        if metric == "acc_norm" and row["chars"]:
            scores = [ll / max(1, chars) for ll, chars in zip(likelihoods, row["chars"], strict=True)]
        prediction = _best(scores)
        items.append(Answer(str(row["id"]), row["question"], nll, prediction, prediction == row["gold"]))
    task = rows[0][0].get("task") or Path(origin).stem
    return Answers(task, group_of(task), metric, "token", tuple(items), origin)


def answers_of_samples(rows: list[tuple[dict, int]], task: str, origin: str) -> Answers:
    """Read rows as lm-eval's --log_samples writes them, each with its line number."""
    items, seen = [], set()
    for row, number in rows:
        if row["doc_id"] in seen:
            continue  # the same question through another filter
        seen.add(row["doc_id"])
        responses = row.get("filtered_resps") or row.get("resps")
        try:
            likelihoods = _finite(map(_likelihood, responses), f"{origin}, line {number}")
            arguments = row["arguments"]
            requests = list(arguments.values()) if isinstance(arguments, dict) else arguments
            texts = [list(one.values()) if isinstance(one, dict) else list(one) for one in requests]
        except (TypeError, ValueError, IndexError, KeyError):
            raise _BadRow(number, "no log-likelihood for each choice; is this a multiple-choice task?") from None
        if "acc" not in row:
            raise _BadRow(number, "the field 'acc' is missing; stability needs a multiple-choice task")
        num_choices = min(len(likelihoods), len(texts))
        if "acc_mutual_info" in row:
            num_choices //= 2  # the second half are the choices without context
        nll = tuple(
            -ll / max(1, len(str(text[1]).encode())) for ll, text in zip(likelihoods, texts[:num_choices], strict=False)
        )
        question = question_hash(str(part) for text in texts for part in text[:2])
        prediction = _best(list(likelihoods[:num_choices]))
        items.append(Answer(str(row["doc_id"]), question, nll, prediction, bool(row["acc"])))
    return Answers(task, group_of(task), "acc", "byte", tuple(items), origin)


def _likelihood(response: Any) -> float:
    """Return the log-likelihood in one response, [ll, greedy] or [[ll, greedy]]; files hold it as text."""
    if isinstance(response, (list, tuple)) and isinstance(response[0], (list, tuple)):
        response = response[0]
    if not isinstance(response, (list, tuple)):
        raise TypeError("a text, not a score")
    return float(response[0])


def _is_opencompass(data: dict) -> bool:
    first = next(iter(data.values()), None)
    return isinstance(first, dict) and "prediction" in first and any(key.startswith("label: ") for key in first)


def _from_opencompass(data: dict, file: Path) -> Answers:
    items = []
    for key in sorted(data, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key)):
        row = data[key]
        labels = [name.removeprefix("label: ") for name in row if name.startswith("label: ")]
        if "gold" not in row or "prediction" not in row or not labels:
            raise TaskError(f"{file}, question {key}: 'gold', 'prediction' or the choices are missing.")
        scores = _finite((row[f"label: {label}"].get("PPL") for label in labels), f"{file}, question {key}")
        prompts = [str(row[f"label: {label}"].get("prompt", "")) for label in labels]
        question = question_hash([*prompts, str(row["gold"])]) if any(prompts) else ""
        prediction = labels.index(str(row["prediction"])) if str(row["prediction"]) in labels else -1
        items.append(Answer(key, question, scores, prediction, str(row["prediction"]) == str(row["gold"])))
    return Answers(file.stem, group_of(file.stem), "ppl", "prompt token", tuple(items), str(file))
