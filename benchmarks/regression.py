"""Is a figure worse than last time? Pure functions over plain numbers; what they are is told in `run.py`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LIMIT = 0.20  # a figure worse by more than this share is a regression
TARGET_MISSED = 3  # exit code of a script that measured everything and names under "missed" what is not good enough


@dataclass(frozen=True)
class Figure:
    """One number of a benchmark's results: its name, how to find it, and which way is better."""

    name: str
    find: Callable[[Mapping[str, Any]], float | None]
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class Change:
    """One figure, last time and now. `worse_by` is a share: 0.25 is a quarter worse, negative is better."""

    name: str
    before: float | None
    now: float | None
    worse_by: float | None
    is_regression: bool


def compare(
    before: Mapping[str, float], now: Mapping[str, float], better: Mapping[str, str], limit: float = LIMIT
) -> list[Change]:
    """Compare two runs figure by figure.

    Args:
        before: name -> number, of the last run; empty when there was none.
        now: the same of this run.
        better: name -> "lower" or "higher".
        limit: share by which a figure may become worse.

    Returns:
        A change for each figure of either run. One that was there and is no longer counts as a regression: what is no
        longer measured cannot be known to be good.
    """
    changes = []
    for name in [*before, *(name for name in now if name not in before)]:
        if name not in now:
            changes.append(Change(name, before[name], None, None, True))
        elif name not in before:
            changes.append(Change(name, None, now[name], None, not math.isfinite(now[name])))
        else:
            worse = worse_by(before[name], now[name], better.get(name, "lower"))
            changes.append(Change(name, before[name], now[name], worse, not worse <= limit))
    return changes


def worse_by(before: float, now: float, better: str) -> float:
    """By which share `now` is worse than `before`; infinite when something appears where there was nothing.

    Both ways are treated alike: twice as slow and half as fast are both worse by 1.
    """
    if not (math.isfinite(before) and math.isfinite(now)):
        return 0.0 if before == now else math.inf
    old, new = (before, now) if better == "lower" else (now, before)
    if old == new:
        return 0.0
    if old <= 0:
        return math.inf if new > old else -1.0
    return new / old - 1


def table(changes: Sequence[Change]) -> str:
    """The changes as aligned text, regressions marked."""
    rows = [("figure", "last", "now", "change", "")]
    for change in changes:
        share = "" if change.worse_by is None else f"{abs(change.worse_by):.1%} {_word(change.worse_by)}"
        mark = "REGRESSION" if change.is_regression else "new" if change.before is None else ""
        rows.append((change.name, _number(change.before), _number(change.now), share, mark))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _word(share: float) -> str:
    return "worse" if share > 0 else "better" if share < 0 else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
