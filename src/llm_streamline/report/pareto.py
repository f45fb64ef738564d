"""Quality against cost: which models no other beats, and the drawing of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llm_streamline.report import svg
from llm_streamline.report.plots import WIDTH, Point, grid, left_margin
from llm_streamline.report.svg import Scale


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
    spots: Sequence[Spot], *, x_label: str, y_label: str, low_x: bool, low_y: bool, log_y: bool = False
) -> Markup:
    """Quality against cost: the models on the Pareto front are joined, the original is a ring."""
    right, top, height = WIDTH - 18, 20.0, 330.0
    bottom = height - 46
    log_y = log_y and min(spot.y for spot in spots) > 0
    ys = [spot.y for spot in spots]
    up = (
        Scale(min(ys) / 1.12, max(ys) * 1.12, bottom, top, log=True)
        if log_y
        else Scale(*svg.padded(ys, 0.1), bottom, top)
    )
    left = left_margin(up)
    across = Scale(*svg.padded([spot.x for spot in spots], 0.1), left, right)
    parts = grid(across, up, left, right, bottom, x_label, y_label, height)
    front = pareto_front([(spot.x, spot.y) for spot in spots], low_x=low_x, low_y=low_y)
    ahead = set(front)
    parts.append(svg.polyline([(across(spots[i].x), up(spots[i].y)) for i in front], "front"))
    for index, spot in enumerate(spots):
        x, y = across(spot.x), up(spot.y)
        style = "spot original" if spot.original else "spot front-spot" if index in ahead else "spot"
        note = svg.tip(f"{spot.name}: {x_label} {spot.x:.4g}, {y_label} {spot.y:.4g}")
        parts.append(svg.circle(x, y, 11, style, **note))
        parts.append(
            svg.text(x, y + 4.4, spot.key, "spot-key inside" if style.endswith("front-spot") else "spot-key", "middle")
        )
    return svg.drawing(WIDTH, height, parts, f"{y_label} against {x_label}", "scatter")
