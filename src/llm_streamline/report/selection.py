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
                "span": layers(candidate.start, candidate.stop),
                "chosen": (candidate.start, candidate.stop) in set(chosen),
                "similarity": decimal(candidate.similarity, 4),
                "first": decimal(candidate.similarity_first, 4),
                "rest": decimal(candidate.similarity_rest, 4),
                "loss": MISSING if loss is None else decimal(loss, 3),
                "perplexity": MISSING if loss is None else decimal(math.exp(min(loss, 50))),
            }
        )
    return rows


def ranked(selection: Selection) -> list[Candidate]:
    """Candidates, best first; those whose loss was not measured come last."""
    return sorted(
        selection.candidates,
        key=lambda c: (c.heldout_loss is None, c.heldout_loss or 0.0, -c.similarity, c.start),
    )


def why(selection: Selection, chosen: Sequence[tuple[int, int]]) -> list[str]:
    """The reasons for the choice, a sentence or two each."""
    text = [f"Target: {selection.target} ({selection.convention.rstrip('.')})."]
    best = ranked(selection)
    verified = [c for c in best if c.heldout_loss is not None]
    if len(chosen) == 1 and verified and (verified[0].start, verified[0].stop) == chosen[0]:
        text.append(_by_loss(selection, verified))
        likest = max(selection.candidates, key=lambda c: (c.similarity, -c.start))
        if (likest.start, likest.stop) != chosen[0] and likest.heldout_loss is not None:
            text.append(
                f"By the mean cosine alone it would have been {layers(likest.start, likest.stop)}, "
                f"at {decimal(likest.heldout_loss - verified[0].heldout_loss, 3)} nats a token more."
            )
    elif len(chosen) == 1 and len(best) > 1 and not verified:
        text.append("The choice rests on the mean cosine alone; no candidate was tried on held-out text.")
    if selection.margin is not None:
        text.append(_margin(selection))
    return [*text, *map(_sentence, selection.notes)]


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".!?" else text + "."


def _by_loss(selection: Selection, verified: Sequence[Candidate]) -> str:
    winner = verified[0]
    text = (
        f"Of {plural(len(verified), 'candidate')} tried on held-out text before training, "
        f"{layers(winner.start, winner.stop)} cost least: {decimal(winner.heldout_loss, 3)} nats a token"
    )
    return text + (
        f" (original {decimal(selection.original_loss, 3)})." if selection.original_loss is not None else "."
    )


def _margin(selection: Selection) -> str:
    margin = selection.margin
    unit, digits = (" nats a token", 3) if margin.quantity == "heldout_loss" else (" of cosine", 4)
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
