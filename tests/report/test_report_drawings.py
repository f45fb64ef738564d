"""Drawings: well-formed, the right numbers in the right places, nothing from data unescaped."""

import builtins
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import similarity, stats_tensors
from safetensors.numpy import save_file

from llm_streamline.errors import MissingExtraError, OutputError, StreamlineError
from llm_streamline.report import pareto, plots, svg
from llm_streamline.report.heatmap import colour, heatmap_svg, read_similarity, write_heatmap_png


def parsed(drawing):
    return ElementTree.fromstring(str(drawing))


def test_every_span_is_one_cell():
    drawing = heatmap_svg(similarity(30)[0], [(12, 22)], [(12, 22), (11, 21)])
    cells = [cell for path in parsed(drawing).iter("path") for cell in re.findall(r"M(\d+) (\d+)h1", path.get("d"))]
    assert len(cells) == len(set(cells)) == 465
    assert set(cells) == {(str(s), str(30 - n)) for n in range(1, 31) for s in range(30 - n + 1)}


def test_values_are_listed_by_start_then_stop():
    rest = similarity(30)[0]
    values = parsed(heatmap_svg(rest)).get("data-values").split(",")
    start, length = 12, 10
    place = start * 30 - start * (start - 1) // 2 + length - 1  # the formula of tips.js
    assert int(values[place]) == round(1e4 * rest[12, 22])


def test_chosen_and_candidates_are_marked():
    classes = [
        mark.get("class") for mark in parsed(heatmap_svg(similarity()[0], [(12, 22)], [(12, 22), (11, 21)])).iter()
    ]
    assert classes.count("chosen") == 1
    assert classes.count("candidate") == 1  # the chosen one is not marked twice


def test_unmeasured_spans_stay_empty_and_a_huge_model_stays_small():
    table = np.full((127, 127), np.nan)
    table[np.triu_indices(127, 1)] = 0.9
    table[3, 9] = np.nan
    drawing = str(heatmap_svg(table))
    assert drawing.count("h1v1") == 126 * 127 // 2 - 1
    assert len(drawing) < 250_000
    with pytest.raises(StreamlineError, match="no token"):
        heatmap_svg(np.full((4, 4), np.nan))


def test_the_smallest_model_can_be_drawn():
    assert str(heatmap_svg(np.eye(2), [(0, 1)])).count("h1v1") == 1


def test_similarity_is_the_token_weighted_mean(tmp_path):
    tensors = stats_tensors()
    save_file(tensors, tmp_path / "stats.safetensors")
    rest, first = similarity()
    table = read_similarity(tmp_path / "stats.safetensors")
    np.testing.assert_allclose(table["all"], (32_704 * rest + 64 * first) / 32_768)
    np.testing.assert_allclose(table["first"], first)
    assert table["norm_first"][12] == pytest.approx(21_558)
    # without counts: a state's cosine with itself has counted the tokens
    bare = {key: value for key, value in tensors.items() if not key.startswith("count")}
    save_file(bare, tmp_path / "bare.safetensors")
    np.testing.assert_allclose(read_similarity(tmp_path / "bare.safetensors")["all"], table["all"])


@pytest.mark.parametrize("content", [b"", b"not tensors at all", b"\xff" * 64])
def test_damaged_statistics_are_one_sentence(tmp_path, content):
    (tmp_path / "stats.safetensors").write_bytes(content)
    with pytest.raises(StreamlineError, match="cannot be read"):
        read_similarity(tmp_path / "stats.safetensors")
    save_file({"other": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(StreamlineError, match="cosine_sum_rest"):
        read_similarity(tmp_path / "other.safetensors")


def test_the_heat_map_as_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_heatmap_png(similarity()[0], tmp_path / "similarity.png", [(12, 22)], [(11, 21)])
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 960  # width in the header
    with pytest.raises(OutputError):
        write_heatmap_png(similarity()[0], tmp_path / "nowhere" / "similarity.png")


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"llm-streamline\[plots\]"):
        write_heatmap_png(similarity()[0], tmp_path / "similarity.png")


def test_the_colour_scale_runs_from_dark_to_bright():
    assert colour(0) == "#440154"
    assert colour(1) == "#fde725"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_ticks_are_inside_ascending_and_few(low, width, count):
    ticks = svg.linear_ticks(low, low + width, count)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 2 * count + 1
    assert all(low - 1e-6 * width - 1e-9 <= tick <= low + width * (1 + 1e-6) + 1e-9 for tick in ticks)


@given(st.floats(1e-4, 1e4), st.floats(1.2, 1e6))
def test_logarithmic_ticks_are_inside(low, factor):
    scale = svg.Scale(low, low * factor, 0, 100, log=True)
    ticks = scale.ticks()
    assert ticks == sorted(ticks)
    assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in ticks)
    assert scale(low) == pytest.approx(0)
    assert scale(low * factor) == pytest.approx(100)
    assert scale(low * math.sqrt(factor)) == pytest.approx(50)


def test_text_in_drawings_is_escaped():
    nasty = '<script>alert("x")</script>'
    for drawing in (
        plots.task_bars([plots.Bar(nasty, 0.5, 0.4, 0.01, 0.01, 0.25)]),
        pareto.scatter([pareto.Spot("A", nasty, 1, 1)], x_label=nasty, y_label=nasty, low_x=True, low_y=True),
        plots.line_chart([plots.Series(nasty, ((0, 1), (1, 2)), dots=True)], x_label=nasty, y_label=nasty),
    ):
        assert "<script" not in str(drawing)
        parsed(drawing)


def test_the_flow_conserves_questions():
    drawing = parsed(plots.stability_flow(1721, 719, 329, 1231))
    pillars = [float(r.get("height")) for r in drawing.iter("rect")]
    assert pillars[0] + pillars[1] == pytest.approx(pillars[2] + pillars[3], abs=0.05)
    assert pillars[0] / pillars[2] == pytest.approx((1721 + 719) / (1721 + 329), rel=1e-3)
    tips = [path.get("data-tip") for path in drawing.iter("path")]
    assert any("right → wrong (TF): 719 of 4,000" in tip for tip in tips)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (5, 0, 0, 0), (0, 0, 0, 7), (0, 3, 0, 0)])
def test_the_flow_of_few_answers_is_still_a_drawing(counts):
    parsed(plots.stability_flow(*counts))
    parsed(plots.outcome_bar(*counts))


def test_a_curve_of_one_point_and_a_flat_curve_can_be_drawn():
    for points in (((0, 1.0),), ((0, 1.0), (5, 1.0)), ((0, 0.0), (1, 0.0))):
        parsed(plots.line_chart([plots.Series("a", points)], x_label="x", y_label="y", log_y=True))


def test_a_long_curve_is_thinned():
    smooth, thin = plots.smoothed([(float(i), float(i % 2)) for i in range(10_000)])
    assert len(thin) <= 240
    assert smooth[100][1] == pytest.approx(0.5, abs=0.05)


def test_the_front_is_what_nothing_beats():
    points = [(1, 5), (2, 3), (3, 4), (4, 1), (4, 2)]
    assert pareto.pareto_front(points, low_x=True, low_y=True) == [0, 1, 3]
    assert pareto.pareto_front(points, low_x=False, low_y=False) == [4, 2, 0]


def test_the_strip_has_a_box_for_each_layer():
    boxes = [r.get("class") for r in parsed(plots.layer_strip(30, [(12, 22, 1)])).iter("rect")]
    assert boxes.count("box kept") == 20
    assert boxes.count("box removed") == 10
    assert boxes.count("box stand-in") == 1
