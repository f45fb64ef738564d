"""The leaderboard's rows, page and default: drawn from result files, over seeds, with development text apart."""

import dataclasses
import html.parser
import json
import math
import statistics

import pytest
from report_samples import results, write_run

from llm_streamline.errors import StreamlineError
from llm_streamline.evaluation.result import HELD_OUT
from llm_streamline.leaderboard.choose import choose_default
from llm_streamline.leaderboard.collect import rows_of
from llm_streamline.leaderboard.page import draw
from llm_streamline.leaderboard.records import Record, Shelf


def record(key, method, seed=0, tokens=0, layers=9, status="done", **more):
    command = f"llm-streamline compress demo -o {key}"
    return Record(
        key=key, model="demo", source="demo", method=method, layers=layers, tokens=tokens, seed=seed, command=command,
        status=status, **more,
    )  # fmt: skip


def with_development(found, gap, stderr=0.01):
    """The same results with figures of the held-out text of the run beside those of the evaluation text."""
    data = found.model_dump(mode="json")
    for model in data["models"]:
        model["perplexity"].append({**model["perplexity"][0], "name": HELD_OUT})
    both = data["comparisons"][0]
    both["perplexity"].append(
        {"name": HELD_OUT, "ratio": math.exp(gap), "nll_difference": gap, "nll_difference_stderr": stderr}
    )
    both["divergence"].append({**both["divergence"][0], "name": HELD_OUT})
    return type(found).model_validate(data)


@pytest.fixture
def shelf(tmp_path):
    shelf = Shelf(tmp_path / "board")
    shelf.open()
    runs = [
        (record("a0", "first"), with_development(results(gap=0.9), 0.7)),
        (record("a1", "first", seed=1), with_development(results(gap=1.1), 0.9)),
        (record("b0", "second"), with_development(results(gap=0.5, name="second"), 1.2)),
        (record("b1", "second", seed=1), with_development(results(gap=0.5, name="second"), 1.2)),
    ]
    for one, result in runs:
        write_run(shelf.result(one.key), result=result)
    records = [
        *(one for one, _ in runs),
        record("c0", "third", status="refused", reason="PlanError: <b>no</b>"),
        record("d0", "fourth", status="pending"),
    ]
    for one in records:
        shelf.write(one)
    shelf.write_board("A board", records)
    return shelf


def rows(shelf):
    return rows_of(shelf.board()[1], shelf)


def test_seeds_become_one_row_with_their_spread(shelf):
    found, others = rows(shelf)
    assert [(row.method, row.seeds) for row in found] == [("first", (0, 1)), ("second", (0, 1))]
    assert [one.status for one in others] == ["refused", "pending"]
    first = found[0]
    assert first.evaluation.value == pytest.approx(1.0)
    window = results(gap=0.9).comparisons[0].perplexity[0].nll_difference_stderr
    assert first.evaluation.stderr == pytest.approx(math.sqrt(window**2 + statistics.variance([0.9, 1.1]) / 2))
    assert first.development.value == pytest.approx(0.8)
    assert found[1].development.stderr == pytest.approx(0.01)  # seeds that agree do not make windows surer
    low, high = first.development.interval
    assert high - low == pytest.approx(2 * 1.96 * first.development.stderr)


def test_a_text_is_development_or_evaluation_and_never_both(shelf):
    first = rows(shelf)[0][0]
    assert HELD_OUT not in first.texts
    assert len(first.texts) == 1


def test_damaged_files_are_a_failure_of_that_run_alone(shelf):
    (shelf.result("a0") / "streamline" / "results.json").write_text("{")
    found, others = rows(shelf)
    assert {row.method: row.seeds for row in found} == {"first": (1,), "second": (0, 1)}
    assert "results.json" in next(one.reason for one in others if one.key == "a0")


def test_costs_are_in_tokens_that_the_original_could_have_read(shelf):
    plan = shelf.result("a0") / "streamline" / "plan.json"
    log = shelf.result("a0") / "streamline" / "training.json"
    data = json.loads(plan.read_text())
    data["selection"]["cost"] = 2.5
    plan.write_text(json.dumps(data))
    log.write_text(json.dumps(json.loads(log.read_text()) | {"forward_tokens": 1e6}))
    (shelf.result("a1") / "streamline" / "plan.json").write_text(json.dumps(data))
    (shelf.result("a1") / "streamline" / "training.json").unlink()
    first, second = rows(shelf)[0]
    assert first.select_forward_tokens == 2.5 * 32_768
    assert first.train_forward_tokens == 5e5  # the mean of a million and of no training
    assert first.forward_tokens == 2.5 * 32_768 + 5e5
    assert second.forward_tokens is None  # nothing is said of its cost


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.words = []

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_drawn_from_files_and_says_everything(shelf):
    data = draw(shelf)
    page = (shelf.out / "leaderboard.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    parser = Tags()
    parser.feed(page)
    text = " ".join(parser.words)
    assert "A board" in text
    assert "2 seeds" in text
    assert "Without training" in text
    assert "PlanError: <b>no</b>" in text  # escaped
    assert "1 run; the same command goes on" in text
    assert "llm-streamline compress demo -o a1" in text
    assert page.count('class="chart scatter"') == 2
    assert data["default"]["0"]["winner"] == "first"
    assert json.loads((shelf.out / "leaderboard.json").read_text())["rows"] == json.loads(json.dumps(data["rows"]))


def test_a_board_without_results_has_a_page(tmp_path):
    shelf = Shelf(tmp_path / "empty")
    shelf.open()
    pending = record("d0", "fourth", status="pending")
    shelf.write(pending)
    shelf.write_board("Empty", [pending])
    draw(shelf)
    assert "No run is finished yet" in (shelf.out / "leaderboard.html").read_text()


# --- the default recipe


@pytest.fixture
def good(shelf):
    return rows(shelf)[0]


def change(row, **changes):
    for name in ("development", "evaluation"):
        if isinstance(changes.get(name), float):
            changes[name] = dataclasses.replace(getattr(row, name), value=changes[name])
    return dataclasses.replace(row, **changes)


def test_the_default_is_chosen_on_development_text_alone(good):
    first, second = good
    assert second.evaluation.value < first.evaluation.value  # on the evaluation text the other one leads
    assert choose_default(good, 0).winner == "first"
    shown = [change(first, evaluation=None, accuracy=None, kl=None, stability=0.0), change(second, evaluation=-9.0)]
    assert choose_default(shown, 0).ranking == choose_default(good, 0).ranking


def test_the_cheapest_within_a_standard_error_wins(good):
    first, second = (change(row, select_forward_tokens=1e6, train_forward_tokens=0.0) for row in good)
    near = change(second, development=first.development.value + 0.05, train_forward_tokens=-5e5)
    choice = choose_default([first, near], 0)
    assert choice.winner == "second"
    assert [standing.method for standing in choice.ranking] == ["first", "second"]
    assert "costs less" in choice.reason
    far = change(near, development=first.development.value + 0.5)
    assert choose_default([first, far], 0).winner == "first"
    dear = change(near, train_forward_tokens=1e9)
    assert choose_default([first, dear], 0).winner == "first"


def test_all_numbers_of_layers_count_alike(good):
    first, second = good
    six = [change(first, layers=6, development=0.6), change(second, layers=6, development=0.05)]
    choice = choose_default([first, second, *six], 0)
    scores = {standing.method: standing.score for standing in choice.ranking}
    assert scores == pytest.approx({"first": (0.8 + 0.6) / 2, "second": (1.2 + 0.05) / 2})
    assert choice.winner == "second"


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"parameters": 200_000_000}, "more parameters than the smallest result"),
        ({"stock": False}, "needs code of its own"),
        ({"seeds": (0,)}, "fewer seeds than others"),
        ({"development": None}, "no finite loss on development text"),
        ({"layers": 6}, "no finished run at"),
    ],
)
def test_what_is_not_comparable_cannot_become_the_default(good, changes, obstacle):
    first, second = good
    choice = choose_default([change(first, **changes), second], 0) if "layers" not in changes else None
    if choice is None:  # a budget that the other lacks: then neither is complete
        with pytest.raises(StreamlineError, match=obstacle):
            choose_default([change(first, **changes), second], 0)
        return
    assert choice.winner == "second"
    assert obstacle in choice.ranking[-1].obstacle


def test_other_budgets_are_left_out(good):
    first, second = good
    assert choose_default([change(first, tokens=262_144), second], 0).winner == "second"
    with pytest.raises(StreamlineError, match="there are no finished runs"):
        choose_default(good, 7)
