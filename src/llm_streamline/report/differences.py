"""The models of several runs and what sets them apart: settings that differ, protocols that forbid comparing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llm_streamline.errors import StreamlineError
from llm_streamline.report import words
from llm_streamline.report.pair import Pair
from llm_streamline.report.protocol import flat
from llm_streamline.report.run import Run
from llm_streamline.report.verdict import Verdict

ABSENT = words.MISSING
NOT_SETTINGS = ("seed",)  # shown last: it differs by intention
MOST_LENGTH = 60


@dataclass(frozen=True)
class Entry:
    """A model of one run; `key` stands for it in plots: a letter, 0 for the original."""

    key: str
    name: str
    pair: Pair
    run: Run
    verdict: Verdict | None = None
    original: bool = False


def identity(model: Any) -> tuple:
    """What makes an original the same one, measured in the same way."""
    # the same original measured in another way is another row
    texts = tuple((text.name, text.data_hash, text.context, round(text.nll, 3)) for text in model.perplexity)
    return model.fingerprint or model.source, texts


def differences(entries: Sequence[Entry]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Settings that are not the same in all runs: from recipe, plan and evaluation, by dotted name."""
    settings = [{} if entry.original else _settings(entry) for entry in entries]
    rivals = [one for one, entry in zip(settings, entries, strict=True) if not entry.original]
    names = dict.fromkeys(name for one in rivals for name in one)
    differing = [name for name in names if len({one.get(name) for one in rivals}) > 1]
    differing.sort(key=lambda name: name in NOT_SETTINGS)
    return tuple((name, tuple(one.get(name, ABSENT) for one in settings)) for name in differing)


def _settings(entry: Entry) -> dict[str, str]:
    run = entry.run
    found: dict[str, str] = {}
    if run.recipe:
        try:
            recipe = yaml.safe_load(run.recipe) or {}
        except yaml.YAMLError as problem:
            raise StreamlineError(f"{run.folder / 'recipe.yaml'} is not YAML: {problem}") from None
        if isinstance(recipe, dict):
            found |= dict(flat(recipe, most=1000))
    if run.plan:
        found["layers taken out"] = words.listed([words.layers(*span).split(" ")[1] for span in run.spans])
    source = run.results.provenance
    found |= {f"evaluation.{name}": text for name, text in flat(source.config, most=1000)}
    found |= {"seed": str(source.seed), "device": source.device, "dtype": source.dtype}
    return {name: text if len(text) <= MOST_LENGTH else text[:MOST_LENGTH] + "…" for name, text in found.items()}


def warnings(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Where numbers that stand side by side do not mean the same."""
    texts: dict[str, set] = {}
    tasks: dict[str, set] = {}
    for entry in entries:
        for text in entry.pair.after.perplexity:
            texts.setdefault(text.name, set()).add((text.data_hash, text.context, text.stride, text.bos))
        for task in entry.pair.after.tasks:
            tasks.setdefault(task.name, set()).add((task.data_hash, task.num_items, task.num_fewshot, task.scorer))
    unlike = [f"perplexity on {words.model_name(name)}" for name, seen in texts.items() if len(seen) > 1]
    unlike += [f"accuracy on {name}" for name, seen in tasks.items() if len(seen) > 1]
    sets = {frozenset(text.name for text in entry.pair.after.perplexity) for entry in entries}
    exams = {frozenset(task.name for task in entry.pair.after.tasks) for entry in entries}
    notes = [f"Not comparable, the protocols differ: {words.listed(unlike)}."] if unlike else []
    if len(sets) > 1:
        notes.append("The runs were measured on different texts, so their mean perplexities are not comparable.")
    if len(exams) > 1:
        notes.append("The runs were measured on different tasks, so their mean accuracies are not comparable.")
    if len({identity(entry.pair.before)[0] for entry in entries if entry.pair.before}) > 1:
        notes.append("The runs start from different originals.")
    machines = {entry.run.results.provenance.device for entry in entries}
    if len(machines) > 1:
        notes.append("Speeds were measured on different devices; only ratios within a run carry over.")
    return tuple(notes)
