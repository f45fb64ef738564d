"""Many runs side by side: what differs in their settings, what came of it, who is ahead. Works from files only."""

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llm_streamline.errors import StreamlineError
from llm_streamline.output import write_text
from llm_streamline.report import words
from llm_streamline.report.accuracy import mean_accuracies
from llm_streamline.report.differences import ABSENT, Entry, differences, identity, warnings
from llm_streamline.report.pair import Pair, pairs
from llm_streamline.report.pareto import Spot, scatter
from llm_streamline.report.run import Run, load_run, what_was_done
from llm_streamline.report.verdict import judge


@dataclass(frozen=True)
class Column:
    """One quantity of all entries."""

    title: str
    short: str  # for narrow terminals
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    best: frozenset[int]  # indices of the best entries that are not an original
    low_is_good: bool


@dataclass(frozen=True)
class Comparison:
    """All that the page and the terminal table show."""

    entries: tuple[Entry, ...]
    differences: tuple[tuple[str, tuple[str, ...]], ...]
    columns: tuple[Column, ...]
    warnings: tuple[str, ...]

    def column(self, title: str) -> Column | None:
        """The column of that title, if any entry has a value in it."""
        return next((column for column in self.columns if column.title == title), None)


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read runs from folders or result files.

    Raises:
        StreamlineError: a run cannot be read, or has no results yet.
    """
    runs = [load_run(path) for path in paths]
    _check_results(runs)
    return runs


def _check_results(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.results is None or not run.results.models:
            raise StreamlineError(f"{run.folder} has no results to compare; `llm-streamline evaluate` makes them.")


def compare(runs: Sequence[Run]) -> Comparison:
    """Put the models of all runs side by side; the original stands first, once for each different source."""
    _check_results(runs)
    entries = _entries(runs)
    columns = tuple(column for column in (_column(entries, *quantity) for quantity in QUANTITIES) if column)
    return Comparison(entries, differences(entries), columns, warnings(entries))


def _entries(runs: Sequence[Run]) -> tuple[Entry, ...]:
    found: list[tuple[str, Pair, Run, bool]] = []
    originals: dict[Any, None] = {}
    for run in runs:
        for pair in pairs(run.results):
            lone = pair.after.role == "original"
            base = pair.after if lone else pair.before
            if base is not None and identity(base) not in originals:
                originals[identity(base)] = None
                found.insert(len(originals) - 1, (words.model_name(base.source), Pair(base), run, True))
            if not lone:
                several = len(run.results.models) > 2
                found.append((pair.after.name if several else run.name, pair, run, False))
    keys = _keys()
    return tuple(
        Entry(
            "0" * (index + 1) if original else next(keys), name, pair, run, None if original else judge(pair), original
        )
        for index, (name, pair, run, original) in enumerate(found)
    )


def _keys():
    for size in range(1, 4):
        yield from (letter * size for letter in string.ascii_uppercase)


def _ratio(entry: Entry) -> float | None:
    if entry.original:
        return 1.0
    found = entry.pair.both.perplexity if entry.pair.both else ()
    return math.exp(sum(p.nll_difference for p in found) / len(found)) if found else None


def _perplexity(entry: Entry) -> float | None:
    found = entry.pair.after.perplexity
    return math.exp(sum(text.nll for text in found) / len(found)) if found else None


def _kl(entry: Entry) -> float | None:
    found = entry.pair.both.divergence if entry.pair.both else ()
    return 0.0 if entry.original else sum(d.kl_mean for d in found) / len(found) if found else None


def _accuracy(entry: Entry) -> float | None:
    if entry.original:
        twice = Pair(entry.pair.after, entry.pair.after)
        return (mean_accuracies(twice) or (None,))[0]
    means = mean_accuracies(entry.pair)
    return means[1] if means else None


def _stability(entry: Entry) -> float | None:
    found = entry.pair.both.stability_averages if entry.pair.both else ()
    chosen = next((a for sigma in ("nll", "ppl") for a in found if a.name == "all" and a.sigma == sigma), None)
    return chosen.stability if chosen else None


def _speed(part: str) -> Callable[[Entry], float | None]:
    def value(entry: Entry) -> float | None:
        if entry.original:
            return 1.0
        found = entry.pair.both.speed if entry.pair.both else None
        return getattr(found, part).ratio if found else None

    return value


Quantity = tuple[str, str, Callable[[Entry], float | None], Callable[[float], str], bool]
QUANTITIES: tuple[Quantity, ...] = (
    ("layers", "layers", lambda e: e.pair.after.size.num_layers, lambda v: f"{v:.0f}", True),
    ("parameters", "params", lambda e: e.pair.after.size.parameters, words.count, True),
    ("perplexity", "ppl", _perplexity, words.decimal, True),
    ("perplexity ratio", "ratio", _ratio, words.times, True),
    ("KL, nats", "KL", _kl, lambda v: words.decimal(v, 3), True),
    ("mean accuracy", "acc", _accuracy, words.percent, False),
    ("stability", "stable", _stability, words.percent, False),
    ("prefill speed", "prefill", _speed("prefill"), words.times, False),
    ("decode speed", "decode", _speed("decode"), words.times, False),
)


def _column(
    entries: Sequence[Entry], title: str, short: str, value: Callable, show: Callable, low: bool
) -> Column | None:
    values = tuple(value(entry) for entry in entries)
    rivals = [v for v, entry in zip(values, entries, strict=True) if v is not None and not entry.original]
    if not rivals:
        return None
    top = (min if low else max)(rivals)
    best = frozenset(i for i, v in enumerate(values) if v == top and not entries[i].original)
    if len(best) == len(rivals):
        best = frozenset()  # a tie of all is no lead
    texts = tuple(ABSENT if v is None else show(v) for v in values)
    return Column(title, short, values, texts, best, low)


PLOTS = (
    ("parameters", "perplexity ratio", "parameters", "perplexity ratio"),
    ("decode speed", "perplexity ratio", "decode speed ratio", "perplexity ratio"),
    ("parameters", "mean accuracy", "parameters", "mean accuracy, %"),
    ("decode speed", "mean accuracy", "decode speed ratio", "mean accuracy, %"),
)


def pareto_plots(found: Comparison) -> list[tuple[str, Markup]]:
    """Title and drawing of each pair of quality and cost that two entries or more have values for."""
    drawings = []
    for x_title, y_title, x_label, y_label in PLOTS:
        across, up = found.column(x_title), found.column(y_title)
        if across is None or up is None:
            continue
        spots = [
            Spot(entry.key, entry.name, x, 100 * y if "%" in y_label else y, entry.original)
            for entry, x, y in zip(found.entries, across.values, up.values, strict=True)
            if x is not None and y is not None
        ]
        if len(spots) < 2:
            continue
        chart = scatter(
            spots,
            x_label=x_label,
            y_label=y_label,
            low_x=across.low_is_good,
            low_y=up.low_is_good,
            log_y=y_title == "perplexity ratio",
        )
        drawings.append((f"{y_title.capitalize()} against {x_title}", chart))
    return drawings


def write_comparison(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page that compares the runs at `paths` to the file `out` and return its path.

    Raises:
        StreamlineError: a run cannot be read, or has no results.
        OutputError: the page cannot be written.
    """
    return write_text(Path(out), render_comparison(load_runs(paths)))


def render_comparison(runs: Sequence[Run]) -> str:
    """The page that compares runs, as text."""
    from llm_streamline.report.html import environment

    found = compare(runs)
    rivals = [entry for entry in found.entries if not entry.original]
    dates = sorted(run.results.provenance.started_at[:10] for run in runs)
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            found=found,
            number=len(rivals),
            date=dates[-1],
            plots=pareto_plots(found),
            sentences=[(entry.key, entry.name, what_was_done(entry.run)) for entry in rivals],
        )
    )
