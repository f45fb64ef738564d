"""The training section of the page: loss curves and what they say."""

from typing import Any

from llm_streamline.report import plots, words
from llm_streamline.report.plots import Mark, Series
from llm_streamline.report.run import Run


def training_view(run: Run) -> dict[str, Any] | None:
    """Sentence and drawings of a training run; None without one."""
    log = run.training
    if log is None:
        return None
    series = []
    raw = [(float(step.tokens), step.loss) for step in log.steps if step.loss is not None]
    if len(raw) > 40:
        smooth, thin = plots.smoothed(raw)
        series.append(Series("training", smooth, "train", faint=thin))
    elif raw:
        series.append(Series("training", tuple(raw), "train"))
    seen = tuple((float(p.tokens), p.loss) for p in log.validation if p.loss is not None)
    if seen:
        series.append(Series("validation", seen, "after", dots=True))
    best = log.best_tokens
    marks = [Mark(float(best), f"kept: step {log.best_step}")] if best is not None else []
    charts = []
    if series:
        chart = plots.line_chart(series, x_label="training tokens", y_label="loss", log_y=_wide(series), marks=marks)
        charts.append(("Loss that was trained on", chart))
    held_out = tuple((float(p.tokens), p.lm_loss) for p in log.validation if p.lm_loss is not None)
    if held_out:
        one = [Series("validation", held_out, "after", dots=True)]
        charts.append(
            (
                "Next-token loss on validation text",
                plots.line_chart(one, x_label="training tokens", y_label="nats a token", marks=marks),
            )
        )
    return {"sentence": _training_sentence(run), "charts": charts}


def _wide(series: list[Series]) -> bool:
    values = [y for one in series for _, y in (*one.points, *one.faint)]
    return min(values) > 0 and max(values) > 5 * min(values)


def _training_sentence(run: Run) -> str:
    log = run.training
    parts = [f"{words.count(log.tokens)} tokens in {words.plural(max((s.step for s in log.steps), default=0), 'step')}"]
    if log.objective_words():
        parts[0] += f" {log.objective_words()}"
    if log.seconds:
        parts.append(f"{words.duration(log.seconds)}")
    if log.tokens_per_second:
        parts.append(f"{words.count(log.tokens_per_second)} tokens per second")
    text = ", ".join(parts) + "."
    judged = "by next-token loss" if any(point.lm_loss is not None for point in log.validation) else "by loss"
    if log.best_step == 0:
        text += f" Judged {judged} on validation text it did not improve on the start, so the start was kept."
    elif log.best_step is not None:
        text += f" The state after step {log.best_step:,}, best {judged} on validation text, was kept."
    starts = sorted((loss, name) for name, loss in log.starts.items() if loss is not None)
    if len(starts) > 1:
        tried = words.listed([f"{name} {words.decimal(loss, 3)}" for loss, name in starts])
        text += f" Starts that were tried, by held-out loss before training: {tried}."
    return text
