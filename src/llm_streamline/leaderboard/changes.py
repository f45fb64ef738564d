"""What a plan does, in the few words that a column of a table has room for, and what two plans have in common."""

from collections.abc import Sequence

from llm_streamline.plan import Edit, Merge, Plan, Remove, Replace, Silence
from llm_streamline.report.words import NBSP


def taken_out(plan: Plan) -> tuple[int, ...] | None:
    """Original layers that leave, whatever comes in their place; None for a plan that merges or silences some."""
    if any(isinstance(edit, Merge | Silence) for edit in plan.edits):
        return None
    return tuple(layer for edit in plan.edits for layer in range(edit.start, edit.stop))


def is_plain_removal(plan: Plan) -> bool:
    """Whether layers leave and nothing comes in their place."""
    return bool(plan.edits) and all(isinstance(edit, Remove) for edit in plan.edits)


def in_short(plan: Plan) -> str:
    """The edits as a table shows them: '2, 11–20 → layer', '3–6 merged', 'attention of 4–8'."""
    return ", ".join(_edit_in_short(edit) for edit in _joined(plan.edits)) or "nothing"


def _joined(edits: Sequence[Edit]) -> list[Edit]:
    """Neighbouring removals as one: a method that picks single layers may have picked a run of them."""
    found: list[Edit] = []
    for edit in edits:
        last = found[-1] if found else None
        if isinstance(last, Remove) and isinstance(edit, Remove) and last.stop == edit.start:
            found[-1] = Remove(start=last.start, stop=edit.stop)
        else:
            found.append(edit)
    return found


def _edit_in_short(edit: Edit) -> str:
    layers = str(edit.start) if edit.stop == edit.start + 1 else f"{edit.start}–{edit.stop - 1}"
    if isinstance(edit, Silence):
        return f"{edit.part} of {layers}"
    if isinstance(edit, Merge):
        return f"{layers}{NBSP}merged"
    if isinstance(edit, Replace):
        network = edit.network
        name = network.kind if network.count == 1 else f"{network.count}{NBSP}{network.kind}s"
        return f"{layers}{NBSP}→{NBSP}{name}"
    return layers
