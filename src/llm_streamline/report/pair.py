"""A model and the original it is measured against, taken out of a result file."""

from dataclasses import dataclass

from llm_streamline.evaluation.result import Comparison, ModelResult, Results, StabilityResult


@dataclass(frozen=True)
class Pair:
    """A model, the original it is measured against, and what was measured of the two together."""

    after: ModelResult
    before: ModelResult | None = None
    both: Comparison | None = None


def pairs(results: Results) -> list[Pair]:
    """Every model that is not an original, with its original where there is one; originals alone if nothing else."""
    original = next((model for model in results.models if model.role == "original"), None)
    found = []
    for model in results.models:
        if model.role == "original":
            continue
        both = next((c for c in results.comparisons if c.model == model.name), None)
        before = results.model(both.original) if both else original
        found.append(Pair(model, before, both))
    return found or [Pair(model) for model in results.models]


def one_per_task(pair: Pair) -> list[StabilityResult]:
    """One result for each task: by plain accuracy where there is one, weighted by NLL where there is one."""
    found: dict[str, StabilityResult] = {}
    for result in pair.both.stability if pair.both else ():
        held = found.get(result.task)
        if held is None or _rank(result) < _rank(held):
            found[result.task] = result
    return list(found.values())


def _rank(result: StabilityResult) -> tuple[bool, bool]:
    return result.metric != "acc", result.sigma != "nll"
