"""Every contiguous span of the length tried by held-out LM loss, as AMD Quark's depth pruning does (its documentation).

No score stands in for the loss: each span is taken out, and the model without it runs from the layer below the span on.
Quark chooses on the text that it evaluates on afterwards; here it is the run's validation text.

With a network in its place, every span is first tried by plain removal, then the best few with the untrained network.
"""

from pydantic import Field, NonNegativeInt

from llm_streamline.errors import PlanError
from llm_streamline.measure.probe import Probe
from llm_streamline.methods.choosing import Trial, lowest_start, sound, spans_plan, tried, untried
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.plan import Candidate, Plan, Selection
from llm_streamline.spans import Span, spans_of_length


class ExhaustiveConfig(MethodConfig):
    """Options of the search. `verify` is how many spans are tried with their network."""

    protect_first: NonNegativeInt = Field(0, description="layers at the beginning that stay")
    protect_last: NonNegativeInt = Field(0, description="layers at the end that stay")

    def check_fits(self, num_layers: int) -> None:
        """Refuse a length that fits nowhere between the protected layers, or leaves nothing to run without it."""
        super().check_fits(num_layers)
        if self.num_removed == num_layers:
            raise PlanError(f"a span of all {num_layers} layers cannot be tried by taking it out; remove fewer")
        if not self.spans(num_layers):
            raise PlanError(
                f"no span of {self.num_removed} layers fits: of {num_layers} layers the first "
                f"{max(self.protect_first, lowest_start(self.network))} and the last {self.protect_last} stay"
            )

    def spans(self, num_layers: int) -> list[Span]:
        """All that may be tried."""
        first = max(self.protect_first, lowest_start(self.network))
        found = spans_of_length(self.num_removed, num_layers)
        return [span for span in found if span[0] >= first and span[1] <= num_layers - self.protect_last]


@method(paper="AMD Quark", config=ExhaustiveConfig)
def exhaustive(probe: Probe, config: ExhaustiveConfig) -> Plan:
    """Contiguous span without which the held-out loss is lowest, every one of them tried."""
    config.check_fits(probe.facts.num_layers)
    spans = config.spans(probe.facts.num_layers)
    removals = [spans_plan(probe.facts, None, [span]) for span in spans]
    good = sound(probe, removals)
    spans = [spans[index] for index in good]
    removed = tried(probe, [removals[index] for index in good])
    if config.network is None:
        trial, scores, name = removed, [None] * len(spans), ""
    else:
        trial, scores = _with_network(probe, config, spans, removed), [removed.mean(i) for i in range(len(spans))]
        name = "loss after plain removal"
    best = trial.order[0]
    candidates = tuple(
        Candidate(start=start, stop=stop, score=score, heldout_loss=trial.mean(index))
        for index, ((start, stop), score) in enumerate(zip(spans, scores, strict=True))
    )
    selection = Selection(
        method="exhaustive",
        target="",
        convention="",
        chosen=spans[best],
        candidates=candidates,
        score_name=name,
        original_loss=removed.original_loss,
        margin=trial.margin,
        notes=(f"all {len(spans)} spans tried on {probe.validation.num_tokens:,} held-out tokens",),
    )
    return spans_plan(probe.facts, config.network, [spans[best]]).model_copy(update={"selection": selection})


def _with_network(probe: Probe, config: ExhaustiveConfig, spans: list[Span], removed: Trial) -> Trial:
    """The best few by plain removal, tried again with their network."""
    few = removed.order[: config.verify]
    if len(few) < 2:
        return Trial(removed.order, None, untried(len(spans), None).losses, removed.margin)
    found = tried(probe, [spans_plan(probe.facts, config.network, [spans[index]]) for index in few])
    losses = dict(zip(few, found.losses, strict=True))
    return Trial([few[i] for i in found.order], None, [losses.get(i) for i in range(len(spans))], found.margin)
