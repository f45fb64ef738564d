"""The similarity of every span as a triangle of colours: inline SVG for the page, PNG for everywhere else.

Shapes: L layers. Column = first layer of the span, row = its number of layers, so spans that remove equally much lie in
one row. Colour is by angle (arccos of the mean cosine): near 1, where spans are chosen, cosines crowd together.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from llm_streamline.errors import MissingExtraError, StreamlineError
from llm_streamline.output import write_bytes
from llm_streamline.report import svg
from llm_streamline.report.words import layers

Span = tuple[int, int]
WIDTH, HEIGHT = 480.0, 478.0
LEFT, TOP, SIDE = 46.0, 8.0, 426.0
NUM_COLOURS = 64
# five stops of the viridis colour map (public domain), even in lightness and safe for colour-blind readers
STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
TICK_COSINES = (0.999, 0.99, 0.97, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0, -0.3, -0.6, -1.0)


def read_similarity(stats_file: Path) -> dict[str, np.ndarray]:
    """Mean similarities and state norms from `stats.safetensors`.

    Args:
        stats_file: as the measuring stage writes it: sums and counts, first tokens of windows kept apart.

    Returns:
        "all", "first", "rest": (L+1, L+1) float64, mean cosine between the states at boundaries i and j;
        "norm_first", "norm_rest": (L+1,) mean norms, where the file has them. NaN where nothing was counted.

    Raises:
        StreamlineError: the file cannot be read or is not of this shape.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        data = load_file(stats_file)
        sums = {part: data[f"cosine_sum_{part}"].astype(np.float64) for part in ("rest", "first")}
        counts = {part: _tokens(data, part) for part in ("rest", "first")}
    except KeyError as problem:
        raise StreamlineError(f"{stats_file} holds no statistics of spans: {problem} is missing.") from None
    except (OSError, SafetensorError, ValueError) as problem:
        raise StreamlineError(f"{stats_file} cannot be read: {problem}") from None
    if sums["rest"].ndim != 2 or sums["rest"].shape[0] != sums["rest"].shape[1] or len(sums["rest"]) < 2:
        raise StreamlineError(f"{stats_file}: cosine_sum_rest is {sums['rest'].shape}, expected (L+1, L+1).")
    result = {part: _mean(sums[part], counts[part]) for part in sums}
    result["all"] = _mean(sums["rest"] + sums["first"], counts["rest"] + counts["first"])
    for part in ("rest", "first"):
        if f"norm_sum_{part}" in data:
            result[f"norm_{part}"] = _mean(data[f"norm_sum_{part}"].astype(np.float64), counts[part])
    return result


def _tokens(data: dict[str, np.ndarray], part: str) -> np.ndarray:
    """Tokens that were summed; where the file keeps no count, a state's cosine with itself has counted them."""
    found = data.get(f"count_{part}")
    return found.astype(np.float64) if found is not None else data[f"cosine_sum_{part}"].diagonal().max()


def _mean(total: np.ndarray, number: np.ndarray) -> np.ndarray:
    number = np.broadcast_to(number, total.shape)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def _angles(similarity: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Angles in radians (L+1, L+1), and the smallest and largest over spans (start < stop)."""
    angles = np.arccos(np.clip(similarity, -1, 1))
    spans = angles[np.triu_indices(len(angles), k=1)]
    spans = spans[np.isfinite(spans)]
    if not len(spans):
        raise StreamlineError("the statistics hold no similarity at all: no token was counted.")
    low, high = float(spans.min()), float(spans.max())
    return angles, low, high if high > low else low + 1e-6


def colour(share: float) -> str:
    """A colour of the scale as #rrggbb: 0 least similar, 1 most similar."""
    place = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    index = min(int(place), len(STOPS) - 2)
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(STOPS[index], STOPS[index + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def heatmap_svg(similarity: np.ndarray, chosen: Sequence[Span] = (), candidates: Sequence[Span] = ()) -> Markup:
    """Draw the heat map.

    Args:
        similarity: (L+1, L+1) mean cosine; cell (start, stop) with start < stop is the span [start, stop).
        chosen: spans that the plan removes or replaces: outlined.
        candidates: spans that were tried: dotted.
    """
    num_layers = len(similarity) - 1
    cell = SIDE / num_layers
    angles, low, high = _angles(similarity)
    others = [span for span in candidates if span not in set(chosen)]
    parts = [
        _cells(angles, low, high, cell),
        *_axes(num_layers, cell),
        *_legend(low, high),
        *(_candidate(span, num_layers, cell) for span in others),
        *_chosen(similarity, chosen, num_layers, cell),
        svg.rect(0, 0, 0, 0, "cursor", visibility="hidden"),
    ]
    values = ",".join(
        "" if math.isnan(similarity[i, j]) else str(round(1e4 * similarity[i, j]))
        for i in range(num_layers)
        for j in range(i + 1, num_layers + 1)
    )
    label = f"Mean cosine similarity of the {num_layers * (num_layers + 1) // 2} spans of {num_layers} layers"
    return svg.drawing(
        WIDTH,
        HEIGHT,
        parts,
        label,
        "heatmap",
        data_layers=num_layers,
        data_values=values,
        data_box=f"{LEFT},{TOP},{SIDE}",
    )


def _cells(angles: np.ndarray, low: float, high: float, cell: float) -> Markup:
    """One path for each colour, in units of cells: a page of 126 layers stays below 200 kB."""
    num_layers = len(angles) - 1
    runs: dict[int, list[str]] = {}
    for length in range(1, num_layers + 1):
        row = [angles[start, start + length] for start in range(num_layers - length + 1)]
        for start, angle in enumerate(row):
            if math.isnan(angle):
                continue
            level = round((NUM_COLOURS - 1) * (high - angle) / (high - low))
            runs.setdefault(level, []).append(f"M{start} {num_layers - length}h1v1h-1z")
    paths = [
        svg.path("".join(commands), fill=colour(level / (NUM_COLOURS - 1))) for level, commands in sorted(runs.items())
    ]
    place = f"translate({svg.number(LEFT)} {svg.number(TOP)}) scale({cell:.5f})"
    return svg.element("g", Markup("").join(paths), transform=place, class_="cells")


def _axes(num_layers: int, cell: float) -> list[Markup]:
    bottom = TOP + SIDE
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if num_layers / s <= 8)
    parts = []
    for index in range(0, num_layers, step):
        parts.append(svg.text(LEFT + (index + 0.5) * cell, bottom + 16, str(index), "tick", "middle"))
    for length in range(step, num_layers + 1, step):
        parts.append(svg.text(LEFT - 6, bottom - (length - 0.5) * cell + 4, str(length), "tick", "end"))
    middle = TOP + SIDE / 2
    parts.append(svg.text(LEFT + SIDE / 2, bottom + 36, "first layer of the span", "axis", "middle"))
    parts.append(
        svg.text(13, middle, "layers in the span", "axis", "middle", transform=f"rotate(-90 13 {svg.number(middle)})")
    )
    return parts


def _legend(low: float, high: float) -> list[Markup]:
    left, width, top, steps = 262.0, 204.0, 30.0, 34
    parts = [svg.text(left + width, top - 10, "mean cosine, in to out", "axis", "end")]
    for i in range(steps):
        parts.append(
            svg.rect(left + width * i / steps, top, width / steps + 0.6, 10, "swatch", fill=colour(i / (steps - 1)))
        )
    used = [-100.0]
    for cosine in sorted(TICK_COSINES):
        angle = math.acos(cosine)
        if not low <= angle <= high:
            continue
        x = left + width * (high - angle) / (high - low)
        if x - used[-1] < 38:
            continue
        used.append(x)
        anchor = "end" if x > left + width - 8 else "start" if x < left + 8 else "middle"
        parts.append(svg.line(x, top + 10, x, top + 14, "grid-strong"))
        parts.append(svg.text(x, top + 27, f"{cosine:g}".replace("-", "−"), "tick", anchor))
    return parts


def _centre(span: Span, num_layers: int, cell: float) -> tuple[float, float]:
    start, stop = span
    return LEFT + (start + 0.5) * cell, TOP + (num_layers - (stop - start) + 0.5) * cell


def _candidate(span: Span, num_layers: int, cell: float) -> Markup:
    x, y = _centre(span, num_layers, cell)
    radius = min(max(cell * 0.24, 1.8), 5)
    return svg.circle(x, y, radius, "candidate-halo") + svg.circle(x, y, radius, "candidate")


def _chosen(similarity: np.ndarray, chosen: Sequence[Span], num_layers: int, cell: float) -> list[Markup]:
    parts = []
    side = max(cell, 6.0)
    for span in chosen:
        x, y = _centre(span, num_layers, cell)
        for class_ in ("chosen-halo", "chosen"):
            parts.append(svg.rect(x - side / 2, y - side / 2, side, side, class_))
    if len(chosen) == 1:
        (start, stop) = chosen[0]
        x, y = _centre(chosen[0], num_layers, cell)
        label_left, label_y = 272.0, 118.0  # in the empty corner above the triangle
        edge = y - side / 2
        if x < label_left:
            points = [(x, edge), (x, label_y - 4), (label_left, label_y - 4)]
        else:
            points = [(x, edge), (x, label_y + 28)]
        parts += [svg.polyline(points, "leader-halo"), svg.polyline(points, "leader")]
        parts.append(svg.text(WIDTH - 14, label_y, f"chosen: {layers(start, stop)}", "strong", "end"))
        value = similarity[start, stop]
        if not math.isnan(value):
            parts.append(svg.text(WIDTH - 14, label_y + 18, f"cosine {value:.4f}", "tick", "end"))
    return parts


def write_heatmap_png(
    similarity: np.ndarray, out: Path, chosen: Sequence[Span] = (), candidates: Sequence[Span] = ()
) -> Path:
    """Draw the same picture as a PNG file.

    Args:
        similarity: (L+1, L+1) mean cosine; cell (start, stop) with start < stop is the span [start, stop).
        out: the file to write.
        chosen: spans to outline.
        candidates: spans to dot.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            'the heat map as PNG needs matplotlib: pip install "llm-streamline[plots]". The report page does not.'
        ) from None
    num_layers = len(similarity) - 1
    angles, low, high = _angles(similarity)
    picture = np.full((num_layers, num_layers), np.nan)
    for length in range(1, num_layers + 1):
        starts = np.arange(num_layers - length + 1)
        picture[length - 1, : len(starts)] = angles[starts, starts + length]
    figure = Figure(figsize=(6.4, 5.4), dpi=150, layout="constrained")  # no pyplot: nothing global is touched
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        picture,
        origin="lower",
        cmap="viridis_r",
        vmin=low,
        vmax=high,
        extent=(-0.5, num_layers - 0.5, 0.5, num_layers + 0.5),
    )
    marks = [span for span in candidates if span not in set(chosen)]
    axes.plot([s for s, _ in marks], [e - s for s, e in marks], "o", mfc="none", mec="white", ms=4, label="tried")
    axes.plot(
        [s for s, _ in chosen], [e - s for s, e in chosen], "s", mfc="none", mec="red", mew=2, ms=8, label="chosen"
    )
    if marks or chosen:
        axes.legend(loc="upper right", facecolor="0.6", framealpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="first layer of the span", ylabel="layers in the span", title="Mean cosine of input and output")
    ticks = [cosine for cosine in TICK_COSINES if low <= math.acos(cosine) <= high]
    bar = figure.colorbar(image, ticks=[math.acos(cosine) for cosine in ticks])
    bar.ax.set_yticklabels([f"{cosine:g}" for cosine in ticks])
    picture_bytes = io.BytesIO()
    figure.savefig(picture_bytes, format="png", metadata={"Software": None})
    return write_bytes(out, picture_bytes.getvalue())
