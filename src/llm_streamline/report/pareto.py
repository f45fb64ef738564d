"""Quality against cost: which models no other beats, and the drawing of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llm_streamline.report import svg
from llm_streamline.report.plots import WIDTH, Point, grid, left_margin
from llm_streamline.report.svg import Scale

_RADIUS = 11.0  # of a model's circle
_DOT = 3.5  # of one without a letter
_MOST_LETTERS = 24  # with more models than that only the best of about the same cost have one
_LETTERS_A_SIZE = 4
_SAME_COST = 0.02  # of the axis


@dataclass(frozen=True)
class Spot:
    """A model in a scatter plot."""

    key: str  # the letter that stands for it in table and plot; several spots may share one
    name: str
    x: float
    y: float
    original: bool = False


def pareto_front(points: Sequence[Point], *, low_x: bool, low_y: bool) -> list[int]:
    """Indices of the points that no other point beats in both directions, from the best x on.

    Args:
        points: (x, y) of each model.
        low_x: smaller x is better.
        low_y: smaller y is better.
    """
    signed = [((x if low_x else -x), (y if low_y else -y), i) for i, (x, y) in enumerate(points)]
    front, best = [], math.inf
    for _, y, index in sorted(signed):
        if y < best:
            front.append(index)
            best = y
    return front


def scatter(
    spots: Sequence[Spot],
    *,
    x_label: str,
    y_label: str,
    low_x: bool,
    low_y: bool,
    log_y: bool = False,
    at_most: float = math.inf,
) -> Markup:
    """Quality against cost: the models on the Pareto front are joined, the original is a ring.

    Where there are too many for a letter each, the best few of about the same cost have one, and the others are dots.

    Args:
        spots: the models.
        x_label: name of the axis, and
        y_label: of the other.
        low_x: smaller x is better.
        low_y: smaller y is better.
        log_y: y in powers of ten.
        at_most: what lies above is drawn at the upper edge, so that a ruin does not flatten all others.
    """
    right, top, height = WIDTH - 18, 20.0, 330.0
    bottom = height - 46
    shown = [min(spot.y, at_most) for spot in spots]
    log_y = log_y and min(shown) > 0
    up = (
        Scale(min(shown) / 1.12, max(shown) * 1.12, bottom, top, log=True)
        if log_y
        else Scale(*svg.padded(shown, 0.1), bottom, top)
    )
    left = left_margin(up)
    across = Scale(*svg.padded([spot.x for spot in spots], 0.1), left, right)
    parts = grid(across, up, left, right, bottom, x_label, y_label, height)
    front = pareto_front([(spot.x, spot.y) for spot in spots], low_x=low_x, low_y=low_y)
    places = [(across(spot.x), up(y)) for spot, y in zip(spots, shown, strict=True)]
    parts.append(svg.polyline([places[i] for i in front], "front"))
    if max(spot.y for spot in spots) > at_most:
        parts.append(svg.text(right, top - 6, f"at the upper edge: above {at_most:g}", "tick", "end"))
    order = sorted(range(len(spots)), key=lambda i: (i not in front, i))  # the front stands where it belongs
    taken: list[Point] = []
    drawn: list[Markup] = []
    lettered = _lettered(spots, front, across, low_y)
    for index in order:
        spot, (x, y) = spots[index], places[index]
        note = svg.tip(f"{spot.name}: {x_label} {spot.x:.4g}, {y_label} {spot.y:.4g}")
        if index not in lettered:
            parts.append(svg.circle(x, y, _DOT, "spot", **note))
            continue
        beside = _free_place(x, y, taken, left, right)
        taken.append((beside, y))
        if beside != x:
            parts.append(svg.line(x, y, beside, y, "grid"))
        style = "spot original" if spot.original else "spot front-spot" if index in front else "spot"
        drawn.append(svg.circle(beside, y, _RADIUS, style, **note))
        ink = "spot-key inside" if style.endswith("front-spot") else "spot-key"
        drawn.append(svg.text(beside, y + 4.4, spot.key, ink, "middle"))
    return svg.drawing(WIDTH, height, [*parts, *drawn], f"{y_label} against {x_label}", "scatter")


def _lettered(spots: Sequence[Spot], front: Sequence[int], across: Scale, low_y: bool) -> set[int]:
    """Indices of the spots that have a letter."""
    if len(spots) <= _MOST_LETTERS:
        return set(range(len(spots)))
    near = _SAME_COST * abs(across.stop - across.start)
    found = {*front, *(i for i, spot in enumerate(spots) if spot.original)}
    for index, spot in enumerate(spots):
        rivals = [i for i, other in enumerate(spots) if abs(across(other.x) - across(spot.x)) <= near]
        rivals.sort(key=lambda i: (spots[i].y if low_y else -spots[i].y, i))
        if index in rivals[:_LETTERS_A_SIZE]:
            found.add(index)
    return found


def _free_place(x: float, y: float, taken: Sequence[Point], left: float, right: float) -> float:
    """The x nearest to the wanted one at which a circle covers no other; the wanted one when there is none."""
    step = 2 * _RADIUS + 1
    for number in range(int((right - left) / step) + 1):
        for candidate in (x + number * step, x - number * step):
            inside = left + _RADIUS <= candidate <= right - _RADIUS or candidate == x
            if inside and all(math.hypot(candidate - a, y - b) >= step - 1e-9 for a, b in taken):
                return candidate
    return x
