"""From result files to rows: one for each method and budget, means over seeds with their uncertainty. No torch.

Differences to the original are paired: over the windows of a text, over the items of a task. A row's variance is that
error, which seeds do not lower because they see the same evaluation, plus the spread over seeds by their number.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from llm_streamline.errors import StreamlineError
from llm_streamline.evaluation.result import HELD_OUT
from llm_streamline.leaderboard.alike import material_of
from llm_streamline.leaderboard.changes import in_short, is_plain_removal, taken_out
from llm_streamline.leaderboard.records import Record, Shelf
from llm_streamline.report.accuracy import mean_accuracies
from llm_streamline.report.pair import Pair
from llm_streamline.report.run import Run, load_run

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A difference to the original with its uncertainty."""

    value: float
    stderr: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None without a standard error."""
        if self.stderr is None:
            return None
        return self.value - _NORMAL_95 * self.stderr, self.value + _NORMAL_95 * self.stderr


@dataclass(frozen=True)
class Row:
    """One method at one budget, over its seeds. Losses are nats a token, model minus original."""

    model: str
    method: str
    layers: int  # fewer in the result, as was asked for
    tokens: int
    seeds: tuple[int, ...]
    num_layers: int
    parameters: int
    parameters_original: int
    development: Estimate | None  # loss on held-out text of the training source
    evaluation: Estimate | None  # loss on the evaluation texts, mean over them
    evaluation_perplexity: float | None
    kl: float | None  # on the evaluation texts, or on the held-out text where there are none
    accuracy: Estimate | None  # mean accuracy, model minus original
    stability: float | None
    stability_stderr: float | None  # over seeds; None for a single one
    stock: bool
    writes: bool | None  # the verdict of the generation check
    select_forward_tokens: float | None  # cost of choosing, in tokens that the original could have read
    train_forward_tokens: float | None
    seconds: float  # wall time of choosing and training
    commands: tuple[str, ...] = field(repr=False)
    keys: tuple[str, ...] = field(repr=False)
    texts: tuple[str, ...] = ()  # names of the evaluation texts
    change: str = ""  # what the plan does, in short
    taken_out: tuple[int, ...] | None = None  # original layers that leave; None: others than that, or not for all seeds
    is_plain: bool = False  # layers leave, nothing comes in their place, nothing is trained
    reference: bool = False  # shown, but does not stand for the default
    note: str = ""  # what the specification says of the method
    material: str = field(default="", repr=False)  # what it was measured on; see alike.py
    developments: tuple[Estimate | None, ...] = field(default=(), repr=False)  # of each seed
    evaluations: tuple[Estimate | None, ...] = field(default=(), repr=False)  # of each seed

    def development_over(self, seeds: Collection[int]) -> Estimate | None:
        """Loss on development text over some of the seeds; None when one of them lacks it."""
        return _combined([one for seed, one in zip(self.seeds, self.developments, strict=True) if seed in seeds])

    @property
    def shown(self) -> Estimate | None:
        """The loss that counts for a reader: on the evaluation texts, or on the held-out text where there are none."""
        return self.evaluation or self.development

    @property
    def forward_tokens(self) -> float | None:
        """Cost of choosing and training together."""
        parts = (self.select_forward_tokens, self.train_forward_tokens)
        return None if None in parts else sum(parts)


def rows_of(records: Sequence[Record], shelf: Shelf) -> tuple[list[Row], list[Record]]:
    """Rows of the finished runs, in the board's order, and the records of the others.

    A finished run whose files are damaged counts as failed, with the reason.
    """
    groups: dict[tuple, list[tuple[Record, Run]]] = {}
    others = []
    for record in records:
        if record.status != "done":
            others.append(record)
            continue
        try:
            run = load_run(shelf.result(record.key))
            if run.pair is None or run.pair.both is None:
                raise StreamlineError(f"{run.folder} holds no comparison with the original")
        except StreamlineError as problem:
            others.append(record.model_copy(update={"status": "failed", "reason": str(problem)}))
            continue
        groups.setdefault((record.model, record.method, record.layers, record.tokens), []).append((record, run))
    return [_row(*key, members) for key, members in groups.items()], others


def _row(model: str, method: str, layers: int, tokens: int, members: list[tuple[Record, Run]]) -> Row:
    pairs = [run.pair for _, run in members]
    size = pairs[0].after.size
    texts = tuple(p.name for p in pairs[0].both.perplexity if p.name != HELD_OUT)
    plans = [run.plan for _, run in members]
    stabilities = [_stability(pair) for pair in pairs]
    developments = tuple(_loss(pair, (HELD_OUT,)) for pair in pairs)
    evaluations = tuple(_loss(pair, texts) if texts else None for pair in pairs)
    return Row(
        model=model,
        method=method,
        layers=layers,
        tokens=tokens,
        seeds=tuple(record.seed for record, _ in members),
        num_layers=size.num_layers,
        parameters=size.parameters,
        parameters_original=pairs[0].before.size.parameters,
        development=_combined(developments),
        evaluation=_combined(evaluations),
        evaluation_perplexity=_mean([_perplexity(pair, texts) for pair in pairs]) if texts else None,
        kl=_mean([_kl(pair, texts or (HELD_OUT,)) for pair in pairs]),
        accuracy=_combined([_accuracy(pair) for pair in pairs]),
        stability=_mean(stabilities),
        stability_stderr=_stderr(stabilities),
        stock=all(record.stock is not False for record, _ in members),
        writes=_all([pair.both.generation.ok if pair.both.generation else None for pair in pairs]),
        select_forward_tokens=_mean([_select_cost(run) for _, run in members]),
        train_forward_tokens=_mean([_train_cost(run) for _, run in members]),
        seconds=statistics.mean(_seconds(run) for _, run in members),
        commands=tuple(record.command for record, _ in members),
        keys=tuple(record.key for record, _ in members),
        texts=texts,
        change=_same([in_short(plan) for plan in plans if plan], "varies with the seed") or "",
        taken_out=_same([taken_out(plan) for plan in plans if plan], None),
        is_plain=all(plan and is_plain_removal(plan) for plan in plans) and not any(run.training for _, run in members),
        reference=any(record.reference for record, _ in members),
        note=members[0][0].note,
        material=material_of(pairs),
        developments=developments,
        evaluations=evaluations,
    )


def _same(values: Sequence[Any], otherwise: Any) -> Any:
    """What all of them are; `otherwise` when they differ."""
    found = set(values)
    return values[0] if len(found) == 1 else otherwise if found else None


def _combined(found: Sequence[Estimate | None]) -> Estimate | None:
    """Mean over seeds; None when one of them lacks it."""
    if not found or any(one is None for one in found):
        return None
    value = statistics.mean(one.value for one in found)
    if any(one.stderr is None for one in found):
        return Estimate(value, None)
    spread = statistics.variance([one.value for one in found]) / len(found) if len(found) > 1 else 0.0
    return Estimate(value, math.sqrt(statistics.mean(one.stderr**2 for one in found) + spread))


def _loss(pair: Pair, names: Sequence[str]) -> Estimate | None:
    found = [text for text in pair.both.perplexity if text.name in names]
    if len(found) != len(names):
        return None
    value = statistics.mean(text.nll_difference for text in found)
    errors = [text.nll_difference_stderr for text in found]
    return Estimate(value, None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors))


def _perplexity(pair: Pair, names: Sequence[str]) -> float | None:
    found = [text.nll for text in pair.after.perplexity if text.name in names]
    return math.exp(statistics.mean(found)) if found else None


def _kl(pair: Pair, names: Sequence[str]) -> float | None:
    return _mean([text.kl_mean for text in pair.both.divergence if text.name in names])


def _accuracy(pair: Pair) -> Estimate | None:
    means = mean_accuracies(pair)
    return Estimate(means[1] - means[0], means[3]) if means else None


def _stability(pair: Pair) -> float | None:
    found = pair.both.stability_averages
    chosen = next((a for sigma in ("nll", "ppl") for a in found if a.name == "all" and a.sigma == sigma), None)
    return chosen.stability if chosen else None


def _select_cost(run: Run) -> float | None:
    """Forwards over the calibration text, times its tokens. A method that says nothing measured nothing that counts."""
    selection = run.plan.selection if run.plan else None
    if selection is None or selection.cost is None:
        return None
    recipe = yaml.safe_load(run.recipe or "") or {}
    tokens = run.stats.get("num_tokens") or recipe.get("calibration", {}).get("tokens")
    return None if tokens is None else selection.cost * tokens


def _train_cost(run: Run) -> float | None:
    return 0.0 if run.training is None else run.training.forward_tokens


def _seconds(run: Run) -> float:
    """Of choosing and training; the pass that measures counts also where another run had made it."""
    stages = run.manifest.get("stage_seconds", {})
    return sum(stages.get(stage, 0.0) for stage in ("measure", "plan", "train"))


def _mean(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else statistics.mean(values)


def _stderr(values: Sequence[float | None]) -> float | None:
    return None if len(values) < 2 or None in values else statistics.stdev(values) / math.sqrt(len(values))


def _all(values: Sequence[bool | None]) -> bool | None:
    return None if None in values else all(values)
