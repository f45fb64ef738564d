"""UIDL, "The Unreasonable Ineffectiveness of the Deeper Layers" (Gromov et al. 2024, arXiv:2403.17887).

The span across which the state of the last token turns least, measured by the angle; the `simple` variant takes the
deepest layers but the last one and measures nothing. We depart from the paper in two ways: the best few spans are tried
by held-out LM loss (off with `verify: 0`), and a network may be put in place of the span.

Windows are packed, so that the last token of a window is what the paper calls the last token of a sequence: a score
rests on as many tokens as there are windows, and its margin says how much that is worth.
"""

from pydantic import Field
from torch import Tensor

from llm_streamline.errors import PlanError
from llm_streamline.measure.angular import AngularStats
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import bootstrap_mean_difference
from llm_streamline.methods.choosing import lowest_start, possible_spans, spans_plan, tried, untried
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.plan import Candidate, Margin, Plan, Selection
from llm_streamline.spans import Span


class UidlConfig(MethodConfig):
    """Options of the search by angle."""

    simple: bool = Field(False, description="the deepest layers but the last one, without measuring anything")

    def check_fits(self, num_layers: int) -> None:
        """Refuse what leaves no layer, or with `simple` not the last one."""
        super().check_fits(num_layers)
        if self.simple and self.num_removed + lowest_start(self.network) >= num_layers:
            raise PlanError(
                f"`simple` keeps the last of {num_layers} layers, and a linear map the first: "
                f"{self.num_removed} cannot leave"
            )


@method(paper="arXiv:2403.17887", config=UidlConfig)
def uidl(probe: Probe, config: UidlConfig) -> Plan:
    """Contiguous span across which the last token's state turns least; or the deepest layers but the last."""
    num_layers, length = probe.facts.num_layers, config.num_removed
    config.check_fits(num_layers)
    if config.simple:
        span = (num_layers - 1 - length, num_layers - 1)
        note = "the deepest layers but the last one; nothing was measured"
        selection = Selection(method="uidl", target="", convention="", chosen=span, notes=(note,))
        return spans_plan(probe.facts, config.network, [span]).model_copy(update={"selection": selection})
    angles = AngularStats(num_layers)
    probe.observe(angles, "measuring angles")
    distance = angles.distance
    spans = possible_spans(probe, config.network, length)
    spans.sort(key=lambda span: (float(distance[span]), span[0]))
    runner_up = spans[1] if len(spans) > 1 else None
    spans = spans[: max(config.verify, 1)]
    plans = [spans_plan(probe.facts, config.network, [span]) for span in spans]
    if config.verify and len(plans) > 1:
        trial = tried(probe, plans)
    else:
        trial = untried(len(plans), _margin(angles, spans[0], runner_up, probe.seed))
    best = trial.order[0]
    candidates = tuple(
        Candidate(start=start, stop=stop, score=float(distance[start, stop]), heldout_loss=trial.mean(index))
        for index, (start, stop) in enumerate(spans)
    )
    selection = Selection(
        method="uidl",
        target="",
        convention="",
        chosen=spans[best],
        candidates=candidates,
        score_name="angular distance",
        original_loss=trial.original_loss,
        margin=trial.margin,
        notes=(f"angles of the last token of {int(angles.group_count.sum()):,} windows",),
    )
    return plans[best].model_copy(update={"selection": selection})


def _margin(angles: AngularStats, chosen: Span, runner_up: Span | None, seed: int) -> Margin | None:
    if runner_up is None:
        return None
    means: Tensor = angles.group_sum / angles.group_count.clamp_min(1)[:, None, None]
    first, second = means[:, runner_up[0], runner_up[1]], means[:, chosen[0], chosen[1]]
    difference, low, high = bootstrap_mean_difference(first, second, angles.group_count, seed)
    blocks = int((angles.group_count > 0).sum())
    return Margin(quantity="angular distance", difference=difference, low=low, high=high, num_blocks=blocks)
