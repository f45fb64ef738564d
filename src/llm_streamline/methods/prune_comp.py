"""Prune&Comp (Chen et al. 2026, arXiv:2507.18212): layers removed one by one, the lost magnitude put back by a factor.

After each removal the state at the cut is multiplied by the mean ratio of its norm behind the layer to that before it,
which changes the scores of the layers that are left; so the next one is scored on the compensated model (`iterative`).
The score is Block Influence. Where a cut grows, its one factor is taken anew, against the original's state behind it.
The factors are folded into stock weights, exactly but for the norms' epsilon: the paper
multiplies embedding and projections below the cut, we divide the projections above it, which is the same function and
leaves the embedding (and a head tied to it) as it is; see `replacements/stream.py`. Where layers read the stream
without a norm, the factor goes out with modelling code.

The first layer stays, because a factor stands behind a layer. Letters: L layers.
"""

from pydantic import Field, PositiveInt, model_validator

from llm_streamline.data.windows import Windows
from llm_streamline.errors import ArchitectureError
from llm_streamline.measure.edited import plan_patches
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import block_influence, mean_similarity
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe
from llm_streamline.methods.choosing import require_network, spans_plan
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.methods.single_layers import first_possible, ranked_layers
from llm_streamline.plan import Plan, Selection
from llm_streamline.spans import runs
from llm_streamline.surgery import shared_view


class PruneCompConfig(MethodConfig):
    """Options of Prune&Comp."""

    iterative: bool = Field(True, description="score anew after each removal; false: once, on the original")
    score_tokens: PositiveInt = Field(8_192, description="calibration tokens each scoring is done on")

    @model_validator(mode="after")
    def _check(self) -> "PruneCompConfig":
        require_network("prune_comp", self.network, "scale", ["magnitude"])
        return self

    def check_fits(self, num_layers: int) -> None:
        """Refuse to remove the first layer, too."""
        super().check_fits(num_layers - 1)


@method(paper="arXiv:2507.18212", config=PruneCompConfig, replacement={"kind": "scale", "init": "magnitude"})
def prune_comp(probe: Probe, config: PruneCompConfig) -> Plan:
    """Single layers by Block Influence, one after the other, each cut followed by a factor that is folded away."""
    num_layers = probe.facts.num_layers
    config.check_fits(num_layers)
    if config.iterative:
        removed: list[int] = []
        notes = []
        while len(removed) < config.num_removed:
            scores = _influence(probe, config, removed)
            possible = [i for i in scores if i > 0 and probe.obstacle(_plan(probe, config, [*removed, i])) is None]
            if not possible:
                raise ArchitectureError(f"only {len(removed)} layers can leave this model one by one; remove fewer")
            layer = min(possible, key=scores.__getitem__)
            removed.append(layer)
            notes.append(f"layer {layer}: Block Influence {scores[layer]:.4f} when it left")
    else:
        scores = block_influence(probe.statistics().similarity).tolist()
        removed = sorted(first_possible(probe, ranked_layers(dict(enumerate(scores[1:], 1))), config.num_removed))
        notes = [f"layer {i}: Block Influence {scores[i]:.4f}" for i in removed]
    selection = Selection(method="prune_comp", target="", convention="", notes=tuple(notes))
    return _plan(probe, config, removed).model_copy(update={"selection": selection})


def _influence(probe: Probe, config: PruneCompConfig, removed: list[int]) -> dict[int, float]:
    """Original layer -> Block Influence in the model without `removed`, compensated."""
    if not removed:
        return dict(enumerate(block_influence(probe.statistics().similarity).tolist()))
    windows = probe.calibration
    windows = Windows(input_ids=windows.input_ids[: max(1, config.score_tokens // windows.seq_len)])
    plan = _plan(probe, config, removed)
    patches = plan_patches(probe.model, plan, probe.start(plan), probe.model.dtype)
    view = shared_view(probe.model, plan.layer_sources(), patches)
    sums = CosineStats(plan.num_layers_after)
    observe(view, windows, sums, probe.batch_tokens, f"scoring without {len(removed)} layers")
    probe.cost.forward(plan.num_layers_after, windows.num_tokens)
    similarity = mean_similarity(sums.cosine_sum_first + sums.cosine_sum_rest, sums.num_tokens)
    return dict(zip(plan.layer_sources(), block_influence(similarity).tolist(), strict=True))


def _plan(probe: Probe, config: PruneCompConfig, removed: list[int]) -> Plan:
    return spans_plan(probe.facts, config.network, runs(sorted(removed)))
