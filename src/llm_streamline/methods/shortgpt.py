"""ShortGPT (Men et al. 2024, arXiv:2403.03853): remove the layers that change the hidden state least."""

from pydantic import model_validator

from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import block_influence
from llm_streamline.methods.choosing import layers_plan, refuse_network
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.plan import Plan, Selection
from llm_streamline.spans import lowest


class ShortgptConfig(MethodConfig):
    """No options of its own."""

    @model_validator(mode="after")
    def _check(self) -> "ShortgptConfig":
        refuse_network("shortgpt", self.network)
        return self


@method(paper="arXiv:2403.03853", config=ShortgptConfig, replacement={"kind": "none"})
def shortgpt(probe: Probe, config: ShortgptConfig) -> Plan:
    """Single layers with the lowest Block Influence, one shot; nothing is put in their place."""
    statistics = probe.statistics()
    scores_L = block_influence(statistics.similarity).tolist()
    layers = lowest(scores_L, config.num_removed)
    selection = Selection(
        method="shortgpt",
        target="",
        convention="",
        order=tuple(sorted(layers, key=lambda i: (scores_L[i], -i))),
        notes=tuple(f"layer {i}: Block Influence {scores_L[i]:.4f}" for i in layers),
    )
    return layers_plan(probe.facts, layers).model_copy(update={"selection": selection})
