"""Multiple-choice questions from local files: read, checked line by line, and made into few-shot prompts.

One JSON object a line (.jsonl, plain or .gz):
    {"id", "context": str, "choices": [str, ...], "gold": int}       score context + choice
    {"id", "contexts": [str, ...], "continuation": str, "gold": int}  score context + continuation (winogrande)
Choices carry their own leading space. An empty context means: after a beginning-of-text token (blimp). `subtask` is
kept for accuracies by subtask; other fields are ignored.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_streamline.errors import TaskError
from llm_streamline.evaluation.answers import question_hash

_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Item:
    """One question: choice i is continuation i after context i; one of the two may be the same for all."""

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    subtask: str | None = None

    @property
    def shared_context(self) -> bool:
        """Whether the choices are continuations of one context (and have lengths to normalise by)."""
        return len(set(self.contexts)) == 1

    @property
    def question(self) -> str:
        """Hash of all texts: two items with it are the same question."""
        return question_hash([*self.contexts, *self.continuations])


@dataclass(frozen=True)
class ChoiceTask:
    """A named set of questions."""

    name: str
    items: tuple[Item, ...]

    @property
    def data_hash(self) -> str:
        """sha256 of questions, choices and gold answers, in order."""
        lines = "\n".join(f"{item.id} {item.question} {item.gold}" for item in self.items)
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def delimiter(self) -> str:
        """The space before every continuation, if all have one; it does not count as part of their length."""
        return " " if all(text.startswith(" ") for item in self.items for text in item.continuations) else ""

    def first(self, limit: int | None) -> "ChoiceTask":
        """Return the task with its first `limit` items only; None keeps all."""
        return replace(self, items=self.items[:limit])


def is_choice_file(name: str) -> bool:
    """Whether a task's name is that of a local multiple-choice file, by its suffix."""
    return name.endswith(_SUFFIXES)


def read_choice_file(path: str | Path) -> ChoiceTask:
    """Read a multiple-choice file; the task is named after the file.

    Raises:
        TaskError: the file is missing, empty, not UTF-8 JSON lines, a field is missing or of the wrong kind, gold is
            out of range, or an id occurs twice; the message names the line.
    """
    path = Path(path)
    items, ids = [], {}
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{where}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise TaskError(f"{where}: expected an object with context, choices and gold, got {type(row).__name__}.")
        item = _item(row, str(row.get("id", number)), where)
        if item.id in ids:
            raise TaskError(f"{where}: the id '{item.id}' was used in line {ids[item.id]} already.")
        ids[item.id] = number
        items.append(item)
    if not items:
        raise TaskError(f"{path} is empty: a task needs at least one question.")
    return ChoiceTask(path.name.removesuffix(".gz").removesuffix(".jsonl"), tuple(items))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            yield from enumerate(lines, 1)
    except UnicodeDecodeError:
        raise TaskError(f"{path} is not UTF-8 text; expected JSON lines.") from None
    except (OSError, EOFError) as error:  # gzip reports a broken file in either way
        raise TaskError(f"cannot read the task file {path}: {getattr(error, 'strerror', None) or error}.") from None


def _item(row: dict, name: str, where: str) -> Item:
    many_contexts = "contexts" in row
    wanted = {"contexts": list, "continuation": str} if many_contexts else {"context": str, "choices": list}
    for field, kind in {**wanted, "gold": int}.items():
        if field not in row:
            raise TaskError(f"{where}: the field '{field}' is missing (found: {', '.join(sorted(row)) or 'nothing'}).")
        if not isinstance(row[field], kind) or isinstance(row[field], bool):
            raise TaskError(f"{where}: '{field}' should be of type {kind.__name__}, got {row[field]!r:.60}.")
    listed = "contexts" if many_contexts else "choices"
    choices = row[listed]
    if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise TaskError(f"{where}: '{listed}' should be at least two strings, got {choices!r:.60}.")
    if not 0 <= row["gold"] < len(choices):
        raise TaskError(f"{where}: gold is {row['gold']}, but there are {len(choices)} {listed} (0 is the first).")
    contexts = tuple(choices) if many_contexts else (row["context"],) * len(choices)
    continuations = (row["continuation"],) * len(choices) if many_contexts else tuple(choices)
    if not all(text.strip() for text in continuations):
        raise TaskError(f"{where}: a choice is empty: there is nothing to score.")
    subtask = str(row["subtask"]) if row.get("subtask") is not None else None
    return Item(name, contexts, continuations, row["gold"], subtask)


def with_examples(task: ChoiceTask, num_fewshot: int) -> ChoiceTask:
    """Put the first `num_fewshot` questions, answered, in front of every other one; those are not scored themselves.

    Raises:
        TaskError: contexts are empty, or no question would be left.
    """
    if num_fewshot == 0:
        return task
    if any(not context for item in task.items for context in item.contexts):
        raise TaskError(f"{task.name} has questions without context; worked examples make no sense there. Use 0 shots.")
    if num_fewshot >= len(task.items):
        raise TaskError(f"{task.name} has {len(task.items)} questions, too few for {num_fewshot} worked examples.")
    shown = "".join(
        item.contexts[item.gold] + item.continuations[item.gold] + "\n\n" for item in task.items[:num_fewshot]
    )
    return replace(task, items=tuple(_prefixed(item, shown) for item in task.items[num_fewshot:]))


def _prefixed(item: Item, shown: str) -> Item:
    return replace(item, contexts=tuple(shown + context for context in item.contexts))


def near_names(name: str, known: Sequence[str]) -> str:
    """Return ' Did you mean ...?' with up to three near names, or ''."""
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
