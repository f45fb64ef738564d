"""LLM-Streamline (Chen et al. 2024, arXiv:2403.19135): remove the contiguous span that changes the hidden state least.

The paper takes the span with the highest mean cosine. We depart from it in three ways, all off with `verify: 0`: the
best few are tried by held-out LM loss, half of these few are the best of the spans that keep every layer that makes
a massive activation, and where each of the few ruins the model all other spans are tried too; the mean cosine alone is
known to pick spans that collapse (specifications: 6.4, findings 1).
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from llm_streamline.measure.files import Statistics
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import bootstrap_mean_difference
from llm_streamline.methods.choosing import (
    Trial,
    extended,
    layers_plan,
    possible_spans,
    spans_plan,
    tried,
    tried_as_well,
    untried,
)
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.plan import Candidate, Margin, Network, Plan, Selection, templates_for
from llm_streamline.spans import Span, interleave, ranked_spans

RUINED = 2.0  # nats above the original: seven times its perplexity


class StreamlineConfig(MethodConfig):
    """Options of the span search."""

    candidates: Literal["both", "mean"] = Field(
        "both",
        description="spans to verify: those that keep massive activations and all, in turns, and where these ruin the "
        "model all others; or the few by mean cosine alone",
    )


@method(paper="arXiv:2403.19135", config=StreamlineConfig)
def streamline(probe: Probe, config: StreamlineConfig) -> Plan:
    """Contiguous span with the highest mean cosine between its input and output, verified by held-out loss."""
    config.check_fits(probe.facts.num_layers)
    statistics = probe.statistics()
    possible = possible_spans(probe, config.network, config.num_removed)
    spans, notes = candidate_spans(statistics, config, possible), ()
    similarity = statistics.similarity
    if config.verify and len(spans) > 1:
        spans, trial, notes = _verified(probe, config, spans, possible)
    else:
        trial = untried(len(spans), _similarity_margin(statistics, spans[0], possible, probe.seed))
    best = trial.order[0]
    plan = spans_plan(probe.facts, config.network, [spans[best]])
    candidates = tuple(
        Candidate(
            start=start,
            stop=stop,
            similarity=float(similarity[start, stop]),
            similarity_first=float(statistics.similarity_first[start, stop]),
            similarity_rest=float(statistics.similarity_rest[start, stop]),
            heldout_loss=trial.mean(index),
        )
        for index, (start, stop) in enumerate(spans)
    )
    selection = Selection(
        method="streamline",
        target="",
        convention="",
        chosen=spans[best],
        candidates=candidates,
        original_loss=trial.original_loss,
        margin=trial.margin,
        notes=(*notes, *_notes(statistics, plan)),
    )
    return plan.model_copy(update={"selection": selection})


def _verified(
    probe: Probe, config: StreamlineConfig, spans: list[Span], possible: Sequence[Span]
) -> tuple[list[Span], Trial, tuple[str, ...]]:
    """Try `spans` by held-out loss; where the best of them ruins the model, the best of all others as well.

    The others, which may be many, are first tried by plain removal: their layers are then shared, and no network is
    built. Returns what was tried with the network, the trial, and what there is to say.
    """
    trial = tried(probe, [spans_plan(probe.facts, config.network, [span]) for span in spans])
    lost = trial.mean(trial.order[0]) - trial.original_loss
    if config.candidates == "mean" or lost < RUINED:
        return spans, trial, ()
    removals = {span: _removal(probe, config.network, span) for span in possible if span not in spans}
    others = [span for span, removal in removals.items() if probe.obstacle(removal) is None]
    if not others:
        return spans, trial, ()
    losses = probe.losses_of([removals[span] for span in others])
    ranked = sorted(range(len(others)), key=lambda index: float(losses[index].mean()))
    best = ranked[: config.verify]
    more = [others[index] for index in best]
    if config.network is None:
        trial = extended(probe, trial, [losses[index] for index in best])
    else:
        trial = tried_as_well(probe, trial, [spans_plan(probe.facts, config.network, [span]) for span in more])
    note = f"the best of the first {len(spans)} by cosine cost {lost:.1f} nats: all {len(others)} others were tried too"
    return [*spans, *more], trial, (note,)


def _removal(probe: Probe, network: Network | None, span: Span) -> Plan:
    """Plain removal of the layers of `span` that a copy does not keep."""
    kept = templates_for(network, *span) if network and network.kind == "layer" else ()
    return layers_plan(probe.facts, [layer for layer in range(*span) if layer not in kept])


def candidate_spans(statistics: Statistics, config: StreamlineConfig, possible: Sequence[Span]) -> list[Span]:
    """The spans worth trying, best first, out of the `possible` ones.

    A span that holds a layer which makes a massive activation costs the model that activation, which a mean over tokens
    cannot show. So spans that keep all such layers, or start a replacement from them, are ranked by themselves as well.
    """
    count = max(config.verify, 1)
    ranked = ranked_spans(statistics.similarity.tolist(), config.num_removed)
    ranked = [span for span in ranked if span in possible]
    if config.candidates == "mean" or count == 1:
        return ranked[:count]
    massive = statistics.massive_layers
    sparing = [span for span in ranked if keeps_massive(span, config.network, massive)]
    return interleave(sparing, ranked, count)


def keeps_massive(span: Span, network: Network | None, massive: list[int]) -> bool:
    """Whether the model without `span` keeps every layer in `massive`, or starts the network in its place from it."""
    kept = templates_for(network, *span) if network else ()
    return not set(massive) & (set(range(*span)) - set(kept))


def _similarity_margin(statistics: Statistics, chosen: Span, possible: Sequence[Span], seed: int) -> Margin | None:
    others = [span for span in possible if span != chosen]
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
