"""Tables for the terminal: before and after, the preview of a plan, many runs side by side. Nothing is printed here."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, Group
from rich.table import Table
from rich.text import Text

from llm_streamline.evaluation.result import Comparison as ModelComparison
from llm_streamline.evaluation.result import Results
from llm_streamline.plan import Plan
from llm_streamline.report import words
from llm_streamline.report.compare import Comparison, compare
from llm_streamline.report.figures import figures, relative, split_interval
from llm_streamline.report.pair import Pair, pairs
from llm_streamline.report.run import Run
from llm_streamline.report.selection import candidate_columns, candidate_rows
from llm_streamline.report.verdict import Verdict, judge, thresholds

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STYLES = {"better": "green", "worse": "red", "same": "", "": ""}
LEVEL_STYLES = {"kept": "bold green", "partly": "bold yellow", "unclear": "bold yellow", "lost": "bold red"}


@dataclass(frozen=True)
class Preview:
    """What a plan is expected to bring and to cost. Whatever is None is left out of the table."""

    parameters: tuple[int, int] | None = None  # before, after
    weight_bytes: tuple[int, int] | None = None
    kv_bytes_per_token: tuple[int, int] | None = None
    prefill_speedup: float | None = None  # expected ratio, above 1 is faster
    decode_speedup: float | None = None
    train_tokens: int | None = None
    train_flops: float | None = None
    train_seconds: float | None = None  # on this machine
    saving_seconds: dict[str, float] | None = None  # on this machine: write, start, reload, forwards
    peak_memory_bytes: int | None = None


def _text(content: str, style: str = "") -> Text:
    # never markup, for names may hold square brackets; never control codes, for models may write them
    return Text(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", words.plain(content)), style=style)


TIMES_HOLD = (
    "Training holds its validations, saving the writing and checking of the files, the proof a fresh process, loading "
    "and its forwards. Measuring, choosing, fitting a start and evaluating are not in these times."
)


@dataclass(frozen=True)
class BeforeAfter:
    """A table that suits the width it is printed in: below 100 columns the values go without their own intervals."""

    pair: Pair

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """What rich asks for when it prints."""
        yield _pair_table(self.pair, own_intervals=options.max_width >= 100)


def before_after_table(results: Results) -> list[BeforeAfter]:
    """A table for each model that was measured, beside its original where there is one; rich prints them."""
    return [BeforeAfter(pair) for pair in pairs(results)]


def _pair_table(pair: Pair, own_intervals: bool) -> Table:
    table = Table(title=_text(_title(pair)), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", min_width=20)
    for column in ("original", "result", "change") if pair.before else ("measured", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("interval", justify="right", style="dim", no_wrap=True)
    group = ""
    for row in figures(pair):
        if row.group != group:
            group = row.group
            table.add_row(_text(group, "bold"))
        values = [row.before, row.after] if pair.before else [row.after]
        if not own_intervals:
            values = [split_interval(value)[0] for value in values]
        interval = row.interval.removeprefix("quartiles ")
        table.add_row(
            _text("  " + row.label), *map(_text, values), _text(row.change, STYLES[row.trend]), _text(interval)
        )
    table.caption = _text("Intervals hold 95 %; those of speed are quartiles over rounds.", "dim")
    table.caption_justify = "left"
    return table


def _title(pair: Pair) -> str:
    name = words.model_name(pair.after.name)
    return f"{name} against {words.model_name(pair.before.source)}" if pair.before else name


def verdict_tables(results: Results) -> list[Table]:
    """The verdict on each model that was compared: each part, what was found, the rule."""
    judged = [(words.model_name(pair.after.name), judge(pair)) for pair in pairs(results)]
    judged = [(name, verdict) for name, verdict in judged if verdict]
    return [_verdict_table(verdict, f"{name}: " if len(judged) > 1 else "") for name, verdict in judged]


def _verdict_table(verdict: Verdict, name: str) -> Table:
    title = _text(f"{name}{verdict.headline}", LEVEL_STYLES[verdict.level])
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for part in verdict.parts:
        table.add_row(_text(part.name), _text(part.word, LEVEL_STYLES[part.level]), _text(part.finding))
    table.caption = _text(thresholds(), "dim")
    table.caption_justify = "left"
    return table


def plan_table(plan: Plan, preview: Preview | None = None) -> Group:
    """What a plan does, what it is expected to bring, and what training it will cost."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "layers",
        str(plan.model.num_layers),
        str(plan.num_layers_after),
        _change(plan.model.num_layers, plan.num_layers_after),
    )
    for label, key, show in (
        ("parameters", "parameters", words.count),
        ("weights", "weight_bytes", words.size),
        ("KV cache per token", "kv_bytes_per_token", words.size),
    ):
        both = getattr(preview, key, None)
        if both is not None:
            table.add_row(label, *(_text(show(value)) for value in both), _change(*both))
    for label, key in (("prefill speed, expected", "prefill_speedup"), ("decode speed, expected", "decode_speedup")):
        ratio = getattr(preview, key, None)
        if ratio is not None:
            table.add_row(label, "", "", _text(words.times(ratio)))
    costs = (
        ("training tokens", "train_tokens", words.count),
        ("training compute", "train_flops", lambda flops: f"{flops:.1e} FLOP"),
        ("training time here, about", "train_seconds", words.duration),
        ("peak memory, about", "peak_memory_bytes", words.size),
    )
    for label, key, show in costs:
        value = getattr(preview, key, None)
        if value is not None:
            table.add_row(label, "", _text(show(value)), "")
    parts = getattr(preview, "saving_seconds", None)
    if parts is not None:
        table.add_row("saving here, about", "", _text(words.duration(parts["write"])), "")
        proof = sum(parts.values()) - parts["write"]
        table.add_row("proof here, about", "", _text(words.duration(proof)), "")
        table.caption = _text(TIMES_HOLD, "dim")
        table.caption_justify = "left"
    return Group(_text(plan.describe(), "bold"), table)


def _change(before: float, after: float) -> Text:
    return _text(words.signed_percent(relative(before, after)))


def candidates_table(plan: Plan) -> Table | None:
    """The spans that were considered, best first; None when the plan does not say."""
    if plan.selection is None or not plan.selection.candidates:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = candidate_columns(plan.selection)
    for column in ("span", *columns.values()):
        table.add_column(_text(column), justify="left" if column == "span" else "right")
    chosen = [(edit.start, edit.stop) for edit in plan.edits]
    for row in candidate_rows(plan.selection, chosen):
        name = row["span"] + (" (chosen)" if row["chosen"] else "")
        cells = (name, *(row[key] for key in columns))
        table.add_row(*map(_text, cells), style="bold" if row["chosen"] else "")
    return table


def stability_table(both: ModelComparison) -> Table:
    """Stability of one pair of models, task by task, then the averages.

    The column `script` is what the authors' published script prints (its weights are those of the first questions, not
    of the questions that match): for comparison with published tables, and for nothing else.
    """
    title = _text(f"{words.model_name(both.model)} against {words.model_name(both.original)}")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold", min_width=8)
    for column in ("sigma", "stability", "95 %", "script", "plain", "TT", "TF", "FT", "FF", "same", "p", "eff."):
        table.add_column(column, justify="right", no_wrap=True)
    for s in both.stability:
        interval = s.stability_interval
        ends = words.between(f"{100 * interval.low:.1f}", f"{100 * interval.high:.1f}") if interval else ""
        shares = (s.stability_reference_bug, s.match_rate)
        cells = (s.task, s.sigma.upper(), _share(s.stability), ends, *map(_share, shares))
        counts = (f"{count:,}" for count in (s.tt, s.tf, s.ft, s.ff))
        rest = (_share(s.prediction_agreement), words.chance_of(s.mcnemar_p), f"{s.effective_questions:,.1f}")
        table.add_row(*map(_text, (*cells, *counts, *rest)))
    for a in both.stability_averages if len(both.stability) > 1 else ():
        cells = (f"mean of {a.name}", a.sigma.upper(), _share(a.stability), "", _share(a.stability_reference_bug))
        same = ("", "", "", "", _share(a.prediction_agreement), "", "")
        table.add_row(*map(_text, (*cells, _share(a.match_rate), *same)), style="bold")
    table.caption = _text(
        "In %. plain: unweighted; same: same option chosen; p: McNemar's exact test of TF against FT; eff.: effective "
        "number of questions; script: the authors' published script, for comparison with published tables only.",
        "dim",
    )
    table.caption_justify = "left"
    return table


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def generation_table(results: Results, most: int = 3) -> Table | None:
    """What original and result write after the same prompts, side by side; None when nothing was written.

    Args:
        results: what `evaluate` measured.
        most: prompts shown, from the first; greedy continuations only.
    """
    pair = next((pair for pair in pairs(results) if pair.after.generation), None)
    if pair is None:
        return None
    table = Table(
        title="What they write", title_justify="left", pad_edge=False, padding=(0, 1), show_lines=True, box=SIMPLE
    )
    models = [model for model in (pair.before, pair.after) if model is not None and model.generation]
    table.add_column("prompt", ratio=1)
    for model in models:
        table.add_column("original" if model.role == "original" else "result", ratio=2)
    texts = [{t.prompt: t for t in model.generation.continuations if t.mode == "greedy"} for model in models]
    for prompt in list(texts[-1])[:most]:
        found = [written.get(prompt) for written in texts]
        table.add_row(_text(prompt, "bold"), *(_text(t.text.strip() if t else "") for t in found))
    return table


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """Differences of settings, then the numbers of many runs, one row a run."""
    found: Comparison = compare(runs)
    tables = []
    if found.differences:
        table = Table(title="What differs", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("setting")
        for entry in found.entries:
            table.add_column(_text(entry.key), justify="right")
        for name, values in found.differences:
            table.add_row(_text(name), *map(_text, values))
        tables.append(table)
    table = Table(title="What came of it", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("run", overflow="fold", min_width=8)
    columns = found.columns
    for column in columns:
        table.add_column(_text(column.short), justify="right", no_wrap=True)
    for index, entry in enumerate(found.entries):
        cells = [_text(c.texts[index], "bold green" if index in c.best else "") for c in columns]
        table.add_row(_text(entry.key, "bold"), _text(entry.name), *cells)
    table.caption = _text(" ".join(found.warnings), "yellow") if found.warnings else None
    table.caption_justify = "left"
    tables.append(table)
    return tables
