"""What became of the answers: stability as flow and table, accuracy as bars. Results -> what the page shows."""

from typing import Any

from llm_streamline.evaluation.result import StabilityAverage, StabilityResult
from llm_streamline.report.accuracy import collapsed
from llm_streamline.report.pair import Pair, one_per_task
from llm_streamline.report.plots import Bar, outcome_bar, stability_flow, task_bars
from llm_streamline.report.words import between, chance_of, decimal, percent, plural

MOST_ROWS = 40  # groups are drawn as one, so more tasks than this are rare; the result file has them all
OUTCOMES = (("TT", "stayed right"), ("TF", "lost"), ("FT", "won"), ("FF", "stayed wrong"))


def answers_view(pair: Pair | None) -> dict[str, Any]:
    """The pieces of the page's section on answers."""
    found = one_per_task(pair) if pair else []
    view: dict[str, Any] = {
        "flow": None,
        "flow_title": "",
        "outcomes": [],
        "stability": [],
        "averages": [],
        "stability_note": "",
        "bars": None,
    }
    if pair:
        view["bars"] = _bars(pair)
    if found:
        counts = [sum(getattr(s, key) for s in found) for key in ("tt", "tf", "ft", "ff")]
        names = found[0].task if len(found) == 1 else f"{len(found)} tasks together"
        view["flow"] = stability_flow(*counts)
        view["flow_title"] = f"{plural(sum(counts), 'question')}, {names}"
        view["outcomes"] = [
            (name, meaning, f"{number:,}", percent(number / sum(counts), 0))
            for (name, meaning), number in zip(OUTCOMES, counts, strict=True)
        ]
        view["stability"] = [_row(result) for result in found[:MOST_ROWS]]
        view["averages"] = [_mean_row(one) for one in _means(pair, found)]
        view["stability_note"] = _note(found)
    return view


def _row(result: StabilityResult) -> dict[str, Any]:
    interval = result.stability_interval
    return {
        "task": result.task,
        "questions": f"{result.num_questions:,}",
        "effective": f"{result.effective_questions:,.1f} effective",
        "bar": outcome_bar(result.tt, result.tf, result.ft, result.ff),
        "stability": percent(result.stability),
        "interval": between(decimal(100 * interval.low, 1), decimal(100 * interval.high, 1)) if interval else "",
        "match": percent(result.match_rate),
        "script": percent(result.stability_reference_bug),
        "same": percent(result.prediction_agreement),
        "flips": f"{result.tf}, {result.ft}",
        "p": chance_of(result.mcnemar_p),
    }


def _means(pair: Pair, found: list[StabilityResult]) -> list[StabilityAverage]:
    if len(found) < 2:
        return []
    return [average for average in pair.both.stability_averages if average.sigma == found[0].sigma]


def _mean_row(average: StabilityAverage) -> dict[str, str]:
    return {
        "task": f"mean of {average.name}",
        "stability": percent(average.stability),
        "match": percent(average.match_rate),
        "script": percent(average.stability_reference_bug),
        "same": percent(average.prediction_agreement),
    }


def _note(found: list[StabilityResult]) -> str:
    sigmas = sorted({result.sigma.upper() for result in found})
    rest = f" The first {MOST_ROWS} of {len(found)} tasks are shown." if len(found) > MOST_ROWS else ""
    return (
        f"Stability weighs each question by the softmax of the spread of its choices' {' or '.join(sigmas)} under the "
        "original. The effective number of questions (1 / sum of squared weights) tells how many carry it. "
        "McNemar's exact test asks whether losses (TF) and gains (FT) are equally likely. “Script” is what the "
        "authors' published script prints, which mixes up weights and questions: for comparison with published "
        "tables only." + rest
    )


def _bars(pair: Pair) -> Any:
    befores = {task.name: task for task in collapsed(pair.before.tasks)} if pair.before else {}
    bars = []
    for task in collapsed(pair.after.tasks):
        if task.acc is None:
            continue
        before = befores.get(task.name)
        bars.append(
            Bar(
                task.name,
                before.acc if before else None,
                task.acc,
                before.acc_stderr if before else None,
                task.acc_stderr,
                task.chance,
            )
        )
    return task_bars(bars[:MOST_ROWS]) if bars else None
