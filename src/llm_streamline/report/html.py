"""OUT/streamline -> OUT/streamline/report.html: one file that needs no network, made from the files of the run alone.

A part whose file is absent is left out. Everything that comes from a file is escaped (jinja2's autoescape, svg.py).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llm_streamline.evaluation.result import Continuation, ModelResult
from llm_streamline.output import write_text
from llm_streamline.plan import Replace, Silence
from llm_streamline.report import plots, words
from llm_streamline.report.accuracy import mean_accuracies
from llm_streamline.report.answers import answers_view
from llm_streamline.report.card import escape_markdown
from llm_streamline.report.curves import training_view
from llm_streamline.report.figures import Figure, figures, relative, split_interval
from llm_streamline.report.heatmap import heatmap_svg
from llm_streamline.report.pair import Pair
from llm_streamline.report.plots import Mark, Series
from llm_streamline.report.protocol import flat, proof_failure, proof_rows, protocol
from llm_streamline.report.run import Run, load_run, network_words, what_was_done
from llm_streamline.report.selection import candidate_columns, candidate_rows, why
from llm_streamline.report.verdict import judge
from llm_streamline.version import __version__


@cache
def environment() -> Environment:
    """The templates: in pages everything is escaped unless our own drawings made it, in Markdown what passes `md`."""
    made = Environment(
        loader=PackageLoader("llm_streamline.report"),
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"split_interval": split_interval, "md": escape_markdown}
    made.globals |= {"version": __version__, "style": _part("style.css"), "script": _part("tips.js")}
    return made


def _part(name: str) -> Markup:
    return Markup(resources.files("llm_streamline.report").joinpath("templates", name).read_text(encoding="utf-8"))


def write_report(out: str | Path, manifest: Mapping[str, Any] | None = None) -> Path:
    """Write OUT/streamline/report.html from the files beside it and return its path.

    Args:
        out: folder of the run.
        manifest: what will stand in the manifest, where it is still to be written: it comes last.

    Raises:
        StreamlineError: OUT holds no run, or one of its files is damaged.
        OutputError: the page cannot be written.
    """
    run = load_run(out)
    if manifest is not None:
        run = replace(run, manifest=manifest)
    path = run.folder / "report.html"
    write_text(path, render(run))
    return path


def render(run: Run) -> str:
    """The page of one run as text."""
    pair = run.pair
    context = {
        "name": run.base_name,
        "date": run.results.provenance.started_at[:10] if run.results else "",
        "shrink": _shrink(run),
        "sentence": what_was_done(run),
        "strip": _strip(run),
        "unsound": proof_failure(run.proof),
        "verdict": judge(pair) if pair else None,
        "no_verdict": "" if run.plan is None else "The result was not compared with the original.",
        "keys": _keys(pair) if pair else [],
        **_similarity(run),
        **_choice(run),
        "training": training_view(run),
        **_table(pair),
        **answers_view(pair),
        **_texts(pair),
        "protocol": protocol(run),
        "recipe": run.recipe,
        "plan_json": run.plan.to_json() if run.plan else "",
        "proof": proof_rows(run.proof),
        "manifest": flat(run.manifest),
    }
    return environment().get_template("report.html.j2").render(sections=_sections(context), **context)


def _sections(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = (
        ("similarity", "Similarity", context["heatmap"]),
        ("choice", "Choice", context["selection"]),
        ("training", "Training", context["training"]),
        ("figures", "Figures", context["rows"]),
        ("answers", "Answers", context["flow"] or context["bars"]),
        ("text", "Text", context["written"]),
        ("protocol", "Protocol", context["protocol"]),
    )
    return [(anchor, title) for anchor, title, there in shown if there]


def _shrink(run: Run) -> str:
    return f"{run.plan.model.num_layers} → {run.plan.num_layers_after} layers" if run.plan else ""


def _strip(run: Run) -> Markup | None:
    if run.plan is None or not run.plan.edits:
        return None
    taken = [edit for edit in run.plan.edits if not isinstance(edit, Silence)]
    if not taken:
        return None
    edits = [(edit.start, edit.stop, len(edit.templates)) for edit in taken]
    networks = {network_words(edit) for edit in run.plan.edits if isinstance(edit, Replace)}
    return plots.layer_strip(run.plan.model.num_layers, edits, words.listed(sorted(networks)))


def _keys(pair: Pair) -> list[dict[str, str]]:
    """The figures that a reader looks for first."""
    cards = []

    def card(what: str, value: str, before: str = "", change: str = "", trend: str = "") -> None:
        since = f"from {before}" if before else ""
        cards.append({"what": what, "value": value, "since": since, "change": change, "trend": trend})

    size = pair.after.size
    for what, key, show in (
        ("parameters", "parameters", words.count),
        ("weights", "weight_bytes", words.size),
        ("KV cache per token", "kv_bytes_per_token", words.size),
    ):
        value = getattr(size, key)
        if pair.before is None:
            card(what, show(value))
        else:
            base = getattr(pair.before.size, key)
            change = relative(base, value)
            card(what, show(value), show(base), words.signed_percent(change), "better" if change < 0 else "")
    if pair.both and pair.both.speed:
        for what, ratio in (("prefill speed", pair.both.speed.prefill), ("decode speed", pair.both.speed.decode)):
            trend = "better" if ratio.low > 1 else "worse" if ratio.high < 1 else ""
            card(what, words.times(ratio.ratio), change=f"ideal {words.times(ratio.ideal_ratio)}", trend=trend)
    for text in pair.after.perplexity[:1]:
        ratio = next((p for p in pair.both.perplexity if p.name == text.name), None) if pair.both else None
        base = next((p for p in pair.before.perplexity if p.name == text.name), None) if pair.before else None
        change = f"{words.times(ratio.ratio)} the original's" if ratio else ""
        card(
            "perplexity" if len(pair.after.perplexity) == 1 else f"perplexity, {words.model_name(text.name)}",
            words.decimal(text.perplexity),
            words.decimal(base.perplexity) if base else "",
            change,
            "worse" if ratio and ratio.ratio > 1 else "",
        )
    for kl in pair.both.divergence[:1] if pair.both else ():
        card("same likeliest token", words.percent(kl.top1_agreement), change=f"KL {words.decimal(kl.kl_mean, 3)} nats")
    means = mean_accuracies(pair)
    if means:
        before, after, _, _ = means
        card(
            "mean accuracy",
            words.percent(after),
            words.percent(before),
            words.points(after - before),
            "worse" if after < before else "better",
        )
    verdict = judge(pair)
    for part in verdict.parts if verdict else ():
        if part.name == "Stability":
            card("stability", part.figure, change=part.finding.rpartition(", ")[2])
    return cards


def _similarity(run: Run) -> dict[str, Any]:
    table = run.similarity
    if table is None:
        return {"heatmap": None}
    chosen = run.spans
    length = chosen[0][1] - chosen[0][0] if len(chosen) == 1 else 0
    return {
        "heatmap": heatmap_svg(table["all"], chosen, run.candidates),
        "chosen": chosen,
        "chosen_length": length,
        "profile": _profile(table, chosen[0]) if length and length < len(table["all"]) - 1 else None,
        "norms": _norms(table),
        "calibration": _calibration(run),
    }


def _calibration(run: Run) -> str:
    tokens = run.stats.get("num_tokens") or run.stats.get("tokens")
    return f"Measured on {words.count(tokens)} tokens." if isinstance(tokens, int | float) else ""


def _profile(table: Mapping[str, Any], chosen: tuple[int, int]) -> Markup:
    length = chosen[1] - chosen[0]
    starts = range(len(table["all"]) - length)

    def points(part: str) -> tuple[tuple[float, float], ...]:
        values = ((float(s), float(table[part][s, s + length])) for s in starts)
        return tuple((x, y) for x, y in values if not math.isnan(y))

    series = [
        Series("other tokens", points("rest"), "after", dots=True),
        Series("first token", points("first"), "first", dots=True),
    ]
    return plots.line_chart(
        [one for one in series if one.points],
        x_label="first layer of the span",
        y_label="mean cosine",
        marks=[Mark(chosen[0], "chosen")],
    )


def _norms(table: Mapping[str, Any]) -> Markup | None:
    series = []
    for part, name, style in (("norm_rest", "other tokens", "after"), ("norm_first", "first token", "first")):
        if part in table:
            points = tuple((float(i), float(v)) for i, v in enumerate(table[part]) if not math.isnan(v))
            series += [Series(name, points, style, dots=True)] if points else []
    return plots.line_chart(series, x_label="layer", y_label="mean length", log_y=True) if series else None


def _choice(run: Run) -> dict[str, Any]:
    if run.plan is None or run.plan.selection is None:
        return {"selection": None, "why": [], "candidates": [], "chosen": run.spans}
    return {
        "selection": run.plan.selection,
        "why": why(run.plan.selection, run.spans),
        "candidates": candidate_rows(run.plan.selection, run.spans),
        "columns": candidate_columns(run.plan.selection),
        "chosen": run.spans,
    }


def _table(pair: Pair | None) -> dict[str, Any]:
    groups: dict[str, list[Figure]] = {}
    for row in figures(pair) if pair else ():
        groups.setdefault(row.group, []).append(row)
    return {"rows": list(groups.items()), "has_before": bool(pair and pair.before)}


def _texts(pair: Pair | None) -> dict[str, Any]:
    """Continuations of both models side by side, greedy and sampled apart."""
    if pair is None or pair.after.generation is None:
        return {"written": False, "greedy": [], "sampled": []}
    befores = _by_prompt(pair.before) if pair.before and pair.before.generation else {}
    samples: dict[str, list[dict[str, Any]]] = {"greedy": [], "sampled": []}
    for key, text in _by_prompt(pair.after).items():
        before = befores.get(key)
        samples[text.mode].append(
            {"prompt": text.prompt, "before": before and _text_view(before), "after": _text_view(text)}
        )
    return {"written": True, **samples}


def _by_prompt(model: ModelResult) -> dict[tuple[str, str, int], Continuation]:
    found: dict[tuple[str, str, int], Continuation] = {}
    for text in model.generation.continuations:
        number = 0
        while (text.prompt, text.mode, number) in found:
            number += 1
        found[text.prompt, text.mode, number] = text
    return found


def _text_view(text: Continuation) -> dict[str, Any]:
    shown = json.loads(text.model_dump_json(include={"text", "loop", "empty", "ended", "num_tokens"}))
    return shown | {"text": text.text.strip(), "repetition": words.percent(text.repetition_rate, 0)}
