"""The model card: README.md of the result, with front matter that the Hub accepts and the truth about what was lost."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from llm_streamline.output import write_text
from llm_streamline.plan import Merge, Replace, Silence
from llm_streamline.report import words
from llm_streamline.report.figures import Figure, figures
from llm_streamline.report.pair import Pair
from llm_streamline.report.run import Run, load_run, network_words, what_was_done
from llm_streamline.report.verdict import judge, thresholds

CARD_FILE = "README.md"
TAGS = ("llm-streamline", "depth-pruning", "layer-pruning", "compression")
INHERITED = ("license", "license_name", "license_link", "language")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---\s*(?:\r?\n|\Z)", re.DOTALL)
_LEFT_OUT_OF_CARD = ("Speed",)  # holds for one machine only; ratios are told in the text


def model_card(
    run: Run, *, title: str | None = None, base_model: str | None = None, base_card: str | None = None
) -> str:
    """The text of README.md.

    Args:
        run: what was done and measured; every part may be absent.
        title: heading; by default the base model's name and the number of layers left.
        base_model: Hub id of the original; found out where the run says that it came from the Hub.
        base_card: text of the original's README.md; licence and language are inherited from its front matter.
    """
    base_model = base_model or _base_model(run)
    name = title or _title(run)
    pair = run.pair
    environment = Environment(
        loader=PackageLoader("llm_streamline.report"),
        autoescape=False,  # Markdown; `md` escapes what comes from files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    body = environment.get_template("card.md.j2").render(
        title=name,
        sentence=words.plain(what_was_done(run)),
        base_model=base_model,
        base_name=run.base_name,
        verdict=judge(pair) if pair else None,
        thresholds=words.plain(thresholds()),
        rows=_rows(pair) if pair else [],
        has_before=bool(pair and pair.before),
        speed=_speed(pair) if pair else "",
        plan=run.plan,
        stand_ins=_stand_ins(run),
        recipe=run.recipe,
        fence=_fence(run.recipe or ""),
        command=run.results.provenance.command if run.results else None,
        versions=run.results.provenance.versions if run.results else {},
        limits=_limits(run),
    )
    matter = front_matter(run, name=name, base_model=base_model, inherited=_inherited(base_card, base_model))
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True, width=100)}---\n\n{words.plain(body)}"


def write_card(
    out: str | Path, *, title: str | None = None, base_model: str | None = None, base_card: str | None = None
) -> Path:
    """Write OUT/README.md from the files in OUT/streamline and return its path; see `model_card`.

    Raises:
        StreamlineError: OUT holds no run, or one of its files is damaged.
        OutputError: the file cannot be written.
    """
    card = model_card(load_run(out), title=title, base_model=base_model, base_card=base_card)
    return write_text(Path(out) / CARD_FILE, card)


def read_front_matter(card: str) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty when there is none or it is not a mapping."""
    found = _FRONT_MATTER.match(card)
    if not found:
        return {}
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}  # another author's card: nothing is inherited from what cannot be read
    return data if isinstance(data, dict) else {}


def front_matter(
    run: Run, *, name: str, base_model: str | None, inherited: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the Hub reads: lineage, licence, tags and the measured numbers. Nothing unknown is filled in."""
    matter: dict[str, Any] = dict(inherited or {})
    if base_model and _HUB_ID.fullmatch(base_model):
        matter["base_model"] = base_model
    model_type = run.plan.model.model_type if run.plan else run.pair.after.model_type if run.pair else None
    matter |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    matter["tags"] = [*TAGS, *([model_type] if model_type else [])]
    datasets = _datasets(run.recipe)
    if datasets:
        matter["datasets"] = datasets
    results = _index(run.pair) if run.pair else []
    if results:
        matter["model-index"] = [{"name": name, "results": results}]
    return matter


def _base_model(run: Run) -> str | None:
    before = run.pair.before if run.pair else None
    if before is not None and before.kind == "hub":
        return before.source
    spec = before.source if before is not None else run.plan.model.spec if run.plan else ""
    return words.CARRIED_BASES[spec][0] if spec in words.CARRIED_BASES else None


def _inherited(base_card: str | None, base_model: str | None) -> dict[str, Any]:
    found = {key: value for key, value in read_front_matter(base_card or "").items() if key in INHERITED and value}
    licences = dict(words.CARRIED_BASES.values())
    if "license" not in found and base_model in licences:
        found["license"] = licences[base_model]
    return found


def _title(run: Run) -> str:
    if run.plan is None:
        return run.name
    return f"{run.base_name.rsplit('/', 1)[-1]} with {run.plan.num_layers_after} of {run.plan.model.num_layers} layers"


def _datasets(recipe: str | None) -> list[str]:
    """Hub data sets that the recipe names as text."""
    found = re.findall(r"hub:([\w.-]+/[\w.-]+)", recipe or "")
    return list(dict.fromkeys(found))


def _index(pair: Pair) -> list[dict[str, Any]]:
    """Entries of `model-index`: one for each text and task."""
    entries = []

    def add(task_type: str, task_name: str, dataset: str, metrics: list[tuple[str, str, float]]) -> None:
        entries.append(
            {
                "task": {"type": task_type, "name": task_name},
                "dataset": {"name": dataset, "type": slug(dataset)},
                "metrics": [{"type": kind, "name": title, "value": round(value, 4)} for kind, title, value in metrics],
            }
        )

    for text in pair.after.perplexity:
        metrics = [("perplexity", f"perplexity (context {text.context})", text.perplexity)]
        if text.bits_per_byte is not None:
            metrics.append(("bits_per_byte", "bits per byte", text.bits_per_byte))
        add("text-generation", "Language modelling", words.model_name(text.name), metrics)
    for task in pair.after.tasks:
        metrics = [
            (kind, f"{key}, {task.num_fewshot}-shot, {task.num_items} items", getattr(task, key))
            for key, kind in (("acc", "accuracy"), ("acc_norm", "acc_norm"))
            if getattr(task, key) is not None
        ]
        metrics += [(slug(m.name), m.name, m.value) for m in task.metrics]
        if metrics:
            kind = "multiple-choice" if task.acc is not None else "text-generation"
            add(
                kind,
                "Multiple choice" if task.acc is not None else "Text generation",
                words.model_name(task.name),
                metrics,
            )
    return entries


def slug(name: str) -> str:
    """A name with the characters that the Hub allows in data set types."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") or "text"


def escape_markdown(text: str) -> str:
    """Text that cannot start a table cell, a tag, a link or a code span."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`|<>\[\]*])", lambda found: "&lt;" if found[0] == "<" else "\\" + found[0], one_line)


def _fence(content: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    return "`" * max(3, longest + 1)


def _rows(pair: Pair) -> list[Figure]:
    rows = []
    for row in figures(pair):
        group, _, text = row.group.partition(", ")  # the text, where several were read
        label = f"stability, {row.label}" if group == "Stability" else f"{row.label}, {text}" if text else row.label
        if group not in _LEFT_OUT_OF_CARD:
            rows.append(replace(row, label=label))
    return rows


def _speed(pair: Pair) -> str:
    if not (pair.both and pair.both.speed and pair.after.speed):
        return ""
    speed, how = pair.both.speed, pair.after.speed
    return (
        f"Measured in turns with the original on one machine: prefill {words.times(speed.prefill.ratio)}, decode "
        f"{words.times(speed.decode.ratio)} (batch {how.batch_size}, prompt of {how.prompt_tokens} tokens)."
    )


def _stand_ins(run: Run) -> list[str]:
    """Where the layers of the result come from, in words."""
    if run.plan is None:
        return []
    lines = []
    for edit in run.plan.edits:
        gone = f"{words.layers(edit.start, edit.stop)} of the original"
        if isinstance(edit, Replace):
            start = run.plan.position_of(edit)
            place = words.layers(start, start + len(edit.templates)) if edit.templates else "the layer before"
            lines.append(f"{gone} became {network_words(edit)} ({place} of this model, start: {edit.network.init})")
        elif isinstance(edit, Merge):
            start = run.plan.position_of(edit)
            lines.append(f"{gone} were merged into one ({words.layers(start, start + 1)} of this model)")
        elif isinstance(edit, Silence):
            lines.append(f"{gone} lost {words.sublayer(edit.part)}: its last projection is zero in this model")
        else:
            lines.append(f"{gone} left without a replacement")
    return [line[0].upper() + line[1:] + "." for line in lines]


def _limits(run: Run) -> list[str]:
    """What a reader must not assume."""
    limits = []
    pair = run.pair
    if pair is None or pair.both is None:
        limits.append("The loss against the original was not measured.")
    else:
        if not pair.after.tasks:
            limits.append("No task was measured; perplexity alone says little about what the model can still do.")
        small = [task.name for task in pair.after.tasks if task.num_items < 500]
        if small:
            limits.append(
                f"Fewer than 500 questions were asked of {words.listed(small)}: small changes cannot be seen."
            )
        if pair.after.perplexity:
            limits.append(
                "Perplexity holds for the text and protocol named; it is not comparable with published figures."
            )
    if run.training is None and run.plan and any(isinstance(edit, Replace) for edit in run.plan.edits):
        limits.append("The replacement was not trained.")
    if run.plan and run.plan.selection:
        limits += [f"{warning[0].upper()}{warning[1:]}." for warning in run.plan.selection.warnings]
    limits += [
        "Knowledge held by the layers that left may be gone in ways that no figure above shows.",
        "Safety and alignment were not evaluated again; treat the model as untested in that respect.",
        "The original's limits and biases remain.",
        "Saved by transformers 5; some older runtimes read the rotary base from another key of the configuration.",
    ]
    return limits
