"""LLM-Streamline (Chen et al. 2024, arXiv:2403.19135): remove the contiguous span that changes the hidden state least.

The paper takes the span with the highest mean cosine. We depart from it in two ways, both off with `verify: 0`: the
best few are tried by held-out LM loss, and half of these few are the best of the spans that keep every layer that makes
a massive activation; the mean cosine alone is known to pick spans that collapse (specifications: 6.4, findings 1).
"""

from typing import Literal

import torch
from pydantic import Field

from llm_streamline.errors import PlanError
from llm_streamline.measure.files import Statistics
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import bootstrap_mean_difference
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.plan import Candidate, Margin, Plan, Remove, Replace, Selection, templates_for
from llm_streamline.spans import Span, interleave, ranked_spans, spans_of_length


class StreamlineConfig(MethodConfig):
    """Options of the span search."""

    candidates: Literal["both", "mean"] = Field(
        "both",
        description="spans to verify: those that keep massive activations and all, in turns; or by mean cosine alone",
    )


@method(paper="arXiv:2403.19135", config=StreamlineConfig)
def streamline(probe: Probe, config: StreamlineConfig) -> Plan:
    """Contiguous span with the highest mean cosine between its input and output, verified by held-out loss."""
    statistics = probe.statistics()
    length = config.num_removed
    put_back = config.network.num_layers_added if config.network else 0
    if length > probe.facts.num_layers or probe.facts.num_layers - length + put_back < 1:
        raise PlanError(f"removing {length} of {probe.facts.num_layers} layers leaves none; ask for fewer")
    lowest_start = 1 if config.network and config.network.kind == "linear" else 0  # it is folded into a layer before it
    spans = candidate_spans(statistics, config, lowest_start)
    plans = [span_plan(probe, config, span) for span in spans]
    similarity = statistics.similarity
    if config.verify and len(plans) > 1:
        original, losses = probe.losses(plans)
        order = sorted(range(len(plans)), key=lambda i: float(losses[i].mean()))
        margin = _loss_margin(losses[order[0]], losses[order[1]], probe.seed)
    else:
        original, losses, order = None, [None] * len(plans), [0]
        margin = _similarity_margin(statistics, spans[0], length, probe.seed)
    candidates = tuple(
        Candidate(
            start=start,
            stop=stop,
            similarity=float(similarity[start, stop]),
            similarity_first=float(statistics.similarity_first[start, stop]),
            similarity_rest=float(statistics.similarity_rest[start, stop]),
            heldout_loss=None if loss is None else float(loss.mean()),
        )
        for (start, stop), loss in zip(spans, losses, strict=True)
    )
    selection = Selection(
        method="streamline",
        target="",
        convention="",
        chosen=spans[order[0]],
        candidates=candidates,
        original_loss=None if original is None else float(original.mean()),
        margin=margin,
        notes=_notes(statistics, plans[order[0]]),
    )
    return plans[order[0]].model_copy(update={"selection": selection})


def candidate_spans(statistics: Statistics, config: StreamlineConfig, lowest_start: int = 0) -> list[Span]:
    """The spans worth trying, best first; none of them starts before `lowest_start`.

    A span that holds a layer which makes a massive activation costs the model that activation, which a mean over tokens
    cannot show. So spans that keep all such layers, or start a replacement from them, are ranked by themselves as well.
    """
    count = max(config.verify, 1)
    ranked = ranked_spans(statistics.similarity.tolist(), config.num_removed)
    ranked = [span for span in ranked if span[0] >= lowest_start]
    if config.candidates == "mean" or count == 1:
        return ranked[:count]
    massive = set(statistics.massive_layers)

    def keeps(span: Span) -> bool:
        kept = templates_for(config.network, *span) if config.network else ()
        return not massive & (set(range(*span)) - set(kept))

    return interleave([span for span in ranked if keeps(span)], ranked, count)


def span_plan(probe: Probe, config: MethodConfig, span: Span) -> Plan:
    """The plan that removes one span, and puts the configured network in its place."""
    start, stop = span
    if config.network is None:
        edit = Remove(start=start, stop=stop)
    else:
        templates = templates_for(config.network, start, stop)
        edit = Replace(start=start, stop=stop, network=config.network, templates=templates)
    return Plan(model=probe.facts, edits=(edit,))


def _loss_margin(best: torch.Tensor, second: torch.Tensor, seed: int) -> Margin:
    weights = torch.ones_like(best)
    difference, low, high = bootstrap_mean_difference(second, best, weights, seed)
    return Margin(quantity="heldout_loss", difference=difference, low=low, high=high, num_blocks=len(best))


def _similarity_margin(statistics: Statistics, chosen: Span, length: int, seed: int) -> Margin | None:
    others = [s for s in spans_of_length(length, statistics.info.model.num_layers) if s != chosen]
    if not others:
        return None
    second = max(others, key=lambda s: float(statistics.similarity[s[0], s[1]]))
    sums, count = statistics.sums.group_cosine_sum, statistics.sums.group_count
    means = sums / count.clamp_min(1)[:, None, None]
    first, other = means[:, chosen[0], chosen[1]], means[:, second[0], second[1]]
    difference, low, high = bootstrap_mean_difference(first, other, count, seed)
    return Margin(quantity="similarity", difference=difference, low=low, high=high, num_blocks=int((count > 0).sum()))


def _notes(statistics: Statistics, plan: Plan) -> tuple[str, ...]:
    massive = statistics.massive_layers
    if not massive:
        return ()
    notes = [f"{_layers(massive)} a massive activation at the first token"]
    edit = plan.edits[0]
    inside = [layer for layer in massive if edit.start <= layer < edit.stop]
    started = [layer for layer in inside if layer in edit.templates]
    lost = [layer for layer in inside if layer not in started]
    if started:
        notes.append(f"the replacement starts from layer {', '.join(map(str, started))}, so it can make it too")
    if lost:
        notes.append(f"the chosen span holds layer {', '.join(map(str, lost))}, so it is lost")
    return tuple(notes)


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]} makes"
    return f"layers {', '.join(map(str, layers))} make"
