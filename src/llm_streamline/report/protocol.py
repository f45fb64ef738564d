"""How the numbers were made: the protocol in words, and any data file as a flat list for the reader."""

import json
from collections.abc import Mapping
from typing import Any

from llm_streamline.evaluation.result import ModelResult
from llm_streamline.report import words
from llm_streamline.report.run import Run

MOST_ROWS, MOST_CHARACTERS = 120, 400


def protocol(run: Run) -> list[tuple[str, str]]:
    """Name and text of each part of the protocol, from results and plan."""
    rows: list[tuple[str, str]] = []
    if run.plan:
        model = run.plan.model
        rows.append(
            ("Model", f"{words.model_name(model.spec)} ({model.model_type}), fingerprint {model.fingerprint[:16]}")
        )
        if run.plan.selection:
            rows.append(("Method", run.plan.selection.method))
        rows.append(("Plan", f"{run.plan.describe()}; digest {run.plan.digest()}"))
    rows += _calibration_rows(run.stats)
    if run.pair is None:
        return rows
    rows += _model_rows(run.pair.after)
    source = run.results.provenance
    rows.append(
        (
            "Device",
            f"{source.device}, {source.dtype}"
            + (f", {words.plural(source.threads, 'thread')}" if source.threads else ""),
        )
    )
    rows.append(("Seed", str(source.seed)))
    if source.platform:
        rows.append(("Platform", source.platform))
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in source.versions.items())))
    if source.command:
        rows.append(("Command", source.command))
    rows.append(("Evaluated", f"{source.started_at}, in {words.duration(source.seconds)}"))
    rows += [(f"Data, {words.model_name(name)}", f"sha256 {value[:16]}") for name, value in source.data_hashes.items()]
    return rows


def _calibration_rows(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the similarities were measured on, as far as `stats.json` says."""
    rows = []
    if "num_tokens" in stats:
        windows = f" in {words.plural(stats['num_windows'], 'window')}" if "num_windows" in stats else ""
        length = f" of {stats['seq_len']}" if "seq_len" in stats else ""
        machine = ", ".join(str(stats[key]) for key in ("dtype", "device") if key in stats)
        rows.append(
            ("Calibration", f"{words.count(stats['num_tokens'])} tokens{windows}{length}, {machine}".rstrip(", "))
        )
    text = stats.get("text")
    if not isinstance(text, Mapping):
        return rows
    sources = [
        f"{source.get('spec')} ({words.percent(source['realised_share'])} of tokens)"
        for source in text.get("sources", ())
        if isinstance(source, Mapping) and "realised_share" in source
    ]
    if sources:
        rows.append(("Calibration text", words.listed(sources)))
    for name, key in (("Beginning of text", "bos"), ("End of text", "eos")):
        if isinstance(text.get(key), Mapping) and "placed" in text[key]:
            rows.append((name, str(text[key]["placed"])))
    if isinstance(text.get("split"), Mapping) and "by" in text["split"]:
        rows.append(("Split of text", f"by {text['split']['by']}; no document is in two sets"))
    return rows


def _model_rows(model: ModelResult) -> list[tuple[str, str]]:
    rows = []
    for text in model.perplexity:
        windows = f"{words.plural(text.num_windows, 'window')} of {text.context}"
        said = (
            f"{words.count(text.num_tokens)} tokens scored in {windows}, "
            f"stride {text.stride}, BOS {text.bos}, joined: {text.join}, {text.dtype}; token-level"
        )
        rows.append((f"Perplexity, {words.model_name(text.name)}", said))
    for task in model.tasks:
        scorer = "own scorer" if task.scorer == "light" else task.scorer
        limit = f", first {task.limit} items" if task.limit else ""
        rows.append(
            (f"Task, {task.name}", f"{words.plural(task.num_items, 'item')}, {task.num_fewshot}-shot, {scorer}{limit}")
        )
    if model.generation:
        made = model.generation
        rows.append(
            (
                "Text",
                f"up to {made.max_new_tokens} tokens; sampled: temperature {made.temperature:g}, top-p {made.top_p:g}",
            )
        )
    if model.speed:
        fast = model.speed
        rows.append(
            (
                "Speed",
                f"batch {fast.batch_size}, prompt {fast.prompt_tokens}, {fast.new_tokens} new tokens, "
                f"{words.plural(fast.rounds, 'round')} in turns with the original, medians",
            )
        )
    return rows


def flat(data: Mapping[str, Any], most: int = MOST_ROWS) -> list[tuple[str, str]]:
    """Nested data as dotted names and text, long values cut, at most `most` rows."""
    rows = list(_walk(data, "")) if data else []
    shown = rows[:most]
    return [*shown, ("…", f"{len(rows) - most} more in the file")] if len(rows) > most else shown


def _walk(value: Any, name: str):
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _walk(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name}[{index}]")
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield name, text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


def proof_rows(proof: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each check of `proof.json` and what it found."""
    return [
        (str(check.get("name", "check")), f"{'passed' if check.get('ok') else 'FAILED'}: {check.get('detail', '')}")
        for check in proof.get("checks", ())
    ]


def proof_failure(proof: Mapping[str, Any]) -> str:
    """What failed in `proof.json`, in words; empty when the proof held or there is none."""
    failed = [f"{c.get('name', 'check')} ({c.get('detail', '')})" for c in proof.get("checks", ()) if not c.get("ok")]
    return f"Failed: {'; '.join(failed)}." if failed else ""
