"""Why these layers: the candidates of a plan as rows, and the reasons for the choice in sentences."""

import math
from collections.abc import Sequence
from typing import Any

from llm_streamline.plan import Candidate, Selection
from llm_streamline.report.words import MISSING, decimal, layers, plural


def candidate_rows(selection: Selection, chosen: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The candidates as text, the best first: by held-out loss where it was measured, else by similarity."""
    rows = []
    for candidate in ranked(selection):
        loss = candidate.heldout_loss
        rows.append(
            {
                "span": _spans(candidate),
                "chosen": candidate.spans == tuple(chosen),
                "score": _or_missing(candidate.score, 4),
                "similarity": _or_missing(candidate.similarity, 4),
                "first": _or_missing(candidate.similarity_first, 4),
                "rest": _or_missing(candidate.similarity_rest, 4),
                "loss": MISSING if loss is None else decimal(loss, 3),
                "perplexity": MISSING if loss is None else decimal(math.exp(min(loss, 50))),
            }
        )
    return rows


def candidate_columns(selection: Selection) -> dict[str, str]:
    """Key of a row -> heading, of what was measured for these candidates."""
    columns = {}
    if any(c.score is not None for c in selection.candidates):
        columns["score"] = selection.score_name
    if any(c.similarity is not None for c in selection.candidates):
        columns |= {"similarity": "cosine", "first": "first token", "rest": "other tokens"}
    return columns | {"loss": "held-out loss"}


def ranked(selection: Selection) -> list[Candidate]:
    """Candidates, best first; those whose loss was not measured come last."""
    return sorted(
        selection.candidates,
        key=lambda c: (c.heldout_loss is None, c.heldout_loss or 0.0, c.score or 0.0, -(c.similarity or 0.0), c.start),
    )


def _or_missing(value: float | None, digits: int) -> str:
    return MISSING if value is None else decimal(value, digits)


def cost_sentence(selection: Selection) -> str | None:
    """What the choice took; None when the plan does not say."""
    if selection.cost is None:
        return None
    return f"The choice took as much as {decimal(selection.cost, 1)} forward passes over the calibration text."


def why(selection: Selection, chosen: Sequence[tuple[int, int]]) -> list[str]:
    """The reasons for the choice, a sentence or two each."""
    text = [f"Target: {selection.target} ({selection.convention.rstrip('.')})."]
    best = ranked(selection)
    verified = [c for c in best if c.heldout_loss is not None]
    if verified and verified[0].spans == tuple(chosen):
        text.append(_by_loss(selection, verified))
        text += _by_score_alone(selection, verified[0])
    elif len(chosen) == 1 and len(best) > 1 and not verified:
        name = selection.score_name or "mean cosine"
        text.append(f"The choice rests on the {name} alone; no candidate was tried on held-out text.")
    if selection.margin is not None:
        text.append(_margin(selection))
    cost = cost_sentence(selection)
    return [*text, *map(_sentence, (*selection.notes, *selection.warnings)), *([cost] if cost else [])]


def _by_score_alone(selection: Selection, winner: Candidate) -> list[str]:
    """What the method's score would have chosen without the trial, when that is another candidate."""
    scored = [c for c in selection.candidates if c.score is not None or c.similarity is not None]
    if not scored:
        return []
    first = min(scored, key=lambda c: (c.score or 0.0, -(c.similarity or 0.0), c.start))
    if first.spans == winner.spans or first.heldout_loss is None:
        return []
    return [
        f"By the {selection.score_name or 'mean cosine'} alone it would have been {_spans(first)}, "
        f"at {decimal(first.heldout_loss - winner.heldout_loss, 3)} nats a token more."
    ]


def _spans(candidate: Candidate) -> str:
    return ", ".join(layers(*span) for span in candidate.spans)


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".!?" else text + "."


def _by_loss(selection: Selection, verified: Sequence[Candidate]) -> str:
    winner = verified[0]
    text = (
        f"Of {plural(len(verified), 'candidate')} tried on held-out text before training, "
        f"{_spans(winner)} cost least: {decimal(winner.heldout_loss, 3)} nats a token"
    )
    return text + (
        f" (original {decimal(selection.original_loss, 3)})." if selection.original_loss is not None else "."
    )


def _margin(selection: Selection) -> str:
    margin = selection.margin
    named = {"heldout_loss": (" nats a token", 3), "similarity": (" of cosine", 4)}
    unit, digits = named.get(margin.quantity, (f" of {margin.quantity}", 4))
    lead = (
        "a clear lead"
        if margin.low > 0
        else "the interval holds zero, so another sample of text might have chosen the runner-up"
    )
    return (
        f"Lead over the runner-up: {decimal(margin.difference, digits)}{unit}, 95 % interval "
        f"[{decimal(margin.low, digits)}, {decimal(margin.high, digits)}] "
        f"over {plural(margin.num_blocks, 'group')} of windows: {lead}."
    )
