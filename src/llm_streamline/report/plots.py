"""Drawings of a run as inline SVG, each a pure function from plain numbers to markup.

Every drawing is laid out about 480 units wide and set between 320 and 560 pixels by the page, so that its text stays
legible on a phone. Colours are classes of templates/style.css: `before` for the original, `after` for the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llm_streamline.report import svg
from llm_streamline.report.svg import Scale
from llm_streamline.report.words import layers, percent

WIDTH = 480.0
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: tuple[Point, ...]
    style: str = "after"  # a class: before, after, train, first
    dots: bool = False
    faint: tuple[Point, ...] = ()  # the raw values behind a smoothed line


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word."""

    x: float
    label: str


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
    label: str = "",
) -> Markup:
    """Lines over a common x axis, named in a legend above."""
    right, top, height = WIDTH - 14, 34.0, 270.0
    bottom = height - 46
    points = [point for one in series for point in (*one.points, *one.faint)]
    values = [y for _, y in points]
    log_y = log_y and min(values) > 0
    low, high = (min(values) / 1.1, max(values) * 1.1) if log_y else svg.padded(values)
    up = Scale(low, high, bottom, top, log=log_y)
    left = left_margin(up)
    across = Scale(min(x for x, _ in points), max(x for x, _ in points), left, right)
    parts = grid(across, up, left, right, bottom, x_label, y_label, height)
    for mark in marks:
        x = across(mark.x)
        anchor = "end" if x > (left + right) / 2 else "start"
        parts.append(svg.line(x, top, x, bottom, "mark"))
        parts.append(svg.text(x + (-5 if anchor == "end" else 5), top + 11, mark.label, "tick", anchor))
    for one in series:
        if one.faint:
            parts.append(svg.polyline([(across(x), up(y)) for x, y in one.faint], f"curve faint {one.style}"))
        parts.append(svg.polyline([(across(x), up(y)) for x, y in one.points], f"curve {one.style}"))
        if one.dots:
            parts += [
                svg.circle(
                    across(x),
                    up(y),
                    3.2,
                    f"dot {one.style}",
                    **svg.tip(f"{one.name}: {y:.4g} at {svg.short(x)} {x_label}"),
                )
                for x, y in one.points
            ]
    x = left
    for one in series:
        parts.append(svg.line(x, 13, x + 18, 13, f"curve {one.style}"))
        parts.append(svg.text(x + 23, 17, one.name, "tick"))
        x += 23 + 7.6 * len(one.name) + 18
    return svg.drawing(WIDTH, height, parts, label or f"{y_label} over {x_label}")


def left_margin(up: Scale) -> float:
    """Room for the longest label of a y axis and the axis's name."""
    return max(52.0, 28 + 8.4 * max((len(svg.short(value)) for value in up.ticks(5)), default=0))


def grid(
    across: Scale, up: Scale, left: float, right: float, bottom: float, x_label: str, y_label: str, height: float
) -> list[Markup]:
    """Lines and labels of two axes."""
    parts = []
    for value in up.ticks(5):
        y = up(value)
        parts.append(svg.line(left, y, right, y, "grid"))
        parts.append(svg.text(left - 6, y + 4, svg.short(value), "tick", "end"))
    for value in across.ticks(6):
        parts.append(svg.text(across(value), bottom + 17, svg.short(value), "tick", "middle"))
    middle = (up.start + up.stop) / 2
    parts.append(svg.line(left, bottom, right, bottom, "grid-strong"))
    parts.append(svg.text((left + right) / 2, height - 8, x_label, "axis", "middle"))
    parts.append(svg.text(12, middle, y_label, "axis", "middle", transform=f"rotate(-90 12 {svg.number(middle)})"))
    return parts


def smoothed(points: Sequence[Point], most: int = 240) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """A running mean of a noisy curve, and the raw curve thinned to at most `most` points."""
    stride = math.ceil(len(points) / most) or 1
    thin = [_mean(points[i : i + stride]) for i in range(0, len(points), stride)]
    half = max(len(thin) // 40, 1)
    smooth = [(thin[i][0], _mean(thin[max(i - half, 0) : i + half + 1])[1]) for i in range(len(thin))]
    return tuple(smooth), tuple(thin)


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def layer_strip(num_layers: int, edits: Sequence[tuple[int, int, int]], kind: str = "layer") -> Markup:
    """The model's layers as a row of boxes: kept ones full, removed ones hollow, what stands in below them.

    Args:
        num_layers: layers of the original.
        edits: (start, stop, networks put in place) for each edit.
        kind: what the networks are, for their tips.
    """
    width = 960.0
    pitch = width / num_layers
    gap = min(pitch * 0.18, 4)
    parts = []
    removed = {i for start, stop, _ in edits for i in range(start, stop)}
    for index in range(num_layers):
        state = "removed" if index in removed else "kept"
        x, size = index * pitch + gap / 2, pitch - gap
        parts.append(svg.rect(x, 4, size, 26, f"box {state}", rx=3.0, **svg.tip(f"layer {index}: {state}")))
    for start, stop, count in edits:
        x1, x2 = start * pitch + gap / 2, stop * pitch - gap / 2
        parts.append(svg.path(f"M{svg.number(x1)} 36v5H{svg.number(x2)}v-5", "bracket"))
        middle = (x1 + x2) / 2
        for k in range(count):
            x = middle + (k - count / 2) * pitch + gap / 2
            parts.append(
                svg.rect(
                    x,
                    49,
                    pitch - gap,
                    26,
                    "box stand-in",
                    rx=3.0,
                    **svg.tip(f"{kind} in place of {layers(start, stop)}"),
                )
            )
        if count == 0:
            parts.append(svg.line(middle, 41, middle, 50, "bracket"))
    return svg.drawing(width, 80 if any(count for *_, count in edits) else 52, parts, f"{num_layers} layers", "strip")


def stability_flow(tt: int, tf: int, ft: int, ff: int) -> Markup:
    """How answers moved: right or wrong under the original (left), right or wrong under the result (right)."""
    total = max(tt + tf + ft + ff, 1)
    height, top, bar, gap = 300.0, 46.0, 16.0, 14.0
    left, right = 96.0, WIDTH - 96
    unit = (height - top - 24 - gap) / total
    starts = {"T": top, "F": top + (tt + tf) * unit + gap}
    ends = {"T": top, "F": top + (tt + ft) * unit + gap}
    parts = [svg.text(left + bar, 22, "original", "axis", "end"), svg.text(right - bar, 22, "result", "axis")]
    words = {"T": "right", "F": "wrong"}
    for name, number in (("TT", tt), ("TF", tf), ("FT", ft), ("FF", ff)):
        before, after = name
        thick = number * unit
        y1, y2 = starts[before], ends[after]
        starts[before] += thick
        ends[after] += thick
        if number:
            note = f"{words[before]} → {words[after]} ({name}): {number:,} of {total:,}, {percent(number / total)}"
            parts.append(svg.path(_ribbon(left + bar, y1, right - bar, y2, thick), f"ribbon {name}", **svg.tip(note)))
            if thick >= 15:
                # crossing ribbons meet in the middle: their names stand near the side they start from
                share = 0.5 if name in ("TT", "FF") else 0.13
                ease = 3 * share**2 - 2 * share**3
                y = y1 + (y2 - y1) * ease + thick / 2 + 4.5
                x = left + bar + (right - left - 2 * bar) * share
                parts.append(svg.text(x, y, name, "on-ribbon", "middle"))
    for x, anchor, side, totals in (
        (left, "end", -8, (tt + tf, ft + ff)),
        (right - bar, "start", bar + 8, (tt + ft, tf + ff)),
    ):
        y = top
        for word, number in zip(("right", "wrong"), totals, strict=True):
            parts.append(svg.rect(x, y, bar, number * unit, f"pillar {word}"))
            if number:
                middle = y + number * unit / 2
                parts.append(svg.text(x + side, middle - 2, word, "strong", anchor))
                parts.append(svg.text(x + side, middle + 15, percent(number / total), "tick", anchor))
            y += number * unit + gap
    label = f"Of {total} questions {tt} stayed right, {tf} were lost, {ft} were won, {ff} stayed wrong"
    return svg.drawing(WIDTH, height, parts, label, "flow")


def _ribbon(x1: float, y1: float, x2: float, y2: float, thick: float) -> str:
    n, bend = svg.number, svg.number((x1 + x2) / 2)
    return (
        f"M{n(x1)} {n(y1)}C{bend} {n(y1)} {bend} {n(y2)} {n(x2)} {n(y2)}v{n(thick)}"
        f"C{bend} {n(y2 + thick)} {bend} {n(y1 + thick)} {n(x1)} {n(y1 + thick)}z"
    )


@dataclass(frozen=True)
class Bar:
    """A task: accuracy before and after as shares, with standard errors where known."""

    name: str
    before: float | None
    after: float
    before_stderr: float | None = None
    after_stderr: float | None = None
    chance: float | None = None


def task_bars(bars: Sequence[Bar]) -> Markup:
    """Accuracy of each task before and after, whiskers of 95 %, a tick where a blind guess would be."""
    left, right, row = 8.0, WIDTH - 74, 58.0
    across = Scale(0, 1, left, right)
    height = 12 + row * len(bars) + 26
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        x = across(value)
        parts.append(svg.line(x, 10, x, height - 24, "grid"))
        anchor = "start" if value == 0 else "middle"
        parts.append(svg.text(x, height - 8, percent(value, 0), "tick", anchor))
    for index, bar in enumerate(bars):
        y = 12 + index * row
        parts.append(svg.text(left, y + 13, bar.name, "strong"))
        for offset, value, stderr, style in (
            (19.0, bar.before, bar.before_stderr, "before"),
            (34.0, bar.after, bar.after_stderr, "after"),
        ):
            if value is None:
                continue
            who = "original" if style == "before" else "result"
            spread = "" if stderr is None else f" ± {percent(1.96 * stderr)}"
            note = svg.tip(f"{bar.name}, {who}: {percent(value)}{spread}")
            parts.append(svg.rect(left, y + offset, across(value) - left, 13, f"bar {style}", **note))
            if stderr is not None:
                parts += _whisker(across, value, 1.96 * stderr, y + offset + 6.5)
            parts.append(svg.text(right + 10, y + offset + 11, percent(value), "tick"))
        if bar.chance is not None:
            x = across(bar.chance)
            tip = svg.tip(f"{bar.name}: a blind guess gets {percent(bar.chance)}")
            parts.append(svg.line(x, y + 16, x, y + 50, "chance", **tip))
    return svg.drawing(WIDTH, height, parts, "Accuracy of each task before and after", "bars")


def _whisker(across: Scale, value: float, spread: float, y: float) -> list[Markup]:
    low, high = across(value - spread), across(value + spread)
    return [
        svg.line(low, y, high, y, "whisker"),
        svg.line(low, y - 3, low, y + 3, "whisker"),
        svg.line(high, y - 3, high, y + 3, "whisker"),
    ]


def outcome_bar(tt: int, tf: int, ft: int, ff: int) -> Markup:
    """The four outcomes of one task as one thin stacked bar."""
    total = max(tt + tf + ft + ff, 1)
    parts, x = [], 0.0
    for name, number in (("TT", tt), ("FT", ft), ("TF", tf), ("FF", ff)):
        width = 200 * number / total
        if number:
            tip = svg.tip(f"{name}: {number:,} of {total:,}, {percent(number / total)}")
            parts.append(svg.rect(x, 0, width, 14, f"ribbon {name}", **tip))
        x += width
    return svg.drawing(200, 14, parts, f"TT {tt}, FT {ft}, TF {tf}, FF {ff}", "outcomes", preserveAspectRatio="none")
