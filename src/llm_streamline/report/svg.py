"""The few pieces that our drawings are made of: scales, ticks and elements of inline SVG.

Colours are CSS classes, so that one drawing serves light, dark and print. All text is escaped here. An element with a
tip shows it on hover and tap (templates/tips.js).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Scale:
    """A map from values to user units of the drawing, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Position of `value`; values outside are drawn at the edge."""
        low, high = self._warp(self.low), self._warp(self.high)
        share = 0.5 if high == low else (self._warp(value) - low) / (high - low)
        return self.start + (self.stop - self.start) * min(max(share, 0.0), 1.0)

    def _warp(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self.log else value

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale, about `count` of them."""
        return _log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) >= min(count, 4) - 1:
            return ticks
    return linear_ticks(low, high, count)


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Lowest and highest value with a little air around them."""
    values = list(values)
    low, high = min(values), max(values)
    air = (high - low) * share or abs(high) * share or 1.0
    return low - air, high + air


def number(value: float) -> str:
    """A coordinate with as few characters as do: 12.0 -> '12', 3.14159 -> '3.14'."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def short(value: float) -> str:
    """A tick label: 1500 -> '1.5k', 0.25 -> '0.25'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.6g}".replace("-", "−")


def element(name: str, content: Markup | str = "", **attributes: object) -> Markup:
    """One element; `class_` and `data_tip` become `class` and `data-tip`, None leaves an attribute out."""
    parts = [Markup("<{}").format(Markup(name))]
    for key, value in attributes.items():
        if value is None:
            continue
        text = number(value) if isinstance(value, float) else value
        parts.append(Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), text))
    if content == "":
        return Markup("").join([*parts, Markup("/>")])
    return Markup("").join([*parts, Markup(">"), escape(content), Markup("</{}>").format(Markup(name))])


def line(x1: float, y1: float, x2: float, y2: float, class_: str, **more: object) -> Markup:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_, **more)


def rect(x: float, y: float, width: float, height: float, class_: str, **more: object) -> Markup:
    """A rectangle."""
    return element("rect", x=float(x), y=float(y), width=float(width), height=float(height), class_=class_, **more)


def circle(x: float, y: float, radius: float, class_: str, **more: object) -> Markup:
    """A circle."""
    return element("circle", cx=float(x), cy=float(y), r=float(radius), class_=class_, **more)


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start", **more: object) -> Markup:
    """A line of text; `anchor` is start, middle or end."""
    anchor_or_none = None if anchor == "start" else anchor
    return element("text", content, x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor_or_none, **more)


def polyline(points: Sequence[tuple[float, float]], class_: str, **more: object) -> Markup:
    """A line through points."""
    return element("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in points), class_=class_, **more)


def path(commands: str, class_: str | None = None, **more: object) -> Markup:
    """A path."""
    return element("path", d=commands, class_=class_, **more)


def tip(label: str) -> dict[str, object]:
    """Attributes that make an element show `label` on hover and tap, and be read out."""
    return {"data_tip": label, "role": "img", "aria_label": label}


def drawing(
    width: float, height: float, parts: Iterable[Markup], label: str, class_: str = "", **more: object
) -> Markup:
    """The whole SVG; `label` tells what it shows to those who cannot see it."""
    view = f"0 0 {number(width)} {number(height)}"
    classes = f"chart {class_}".strip()
    return element("svg", Markup("").join(parts), viewBox=view, role="group", aria_label=label, class_=classes, **more)
