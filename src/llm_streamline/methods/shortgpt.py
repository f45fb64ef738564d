"""ShortGPT (Men et al. 2024, arXiv:2403.03853): remove the layers that change the hidden state least."""

from pydantic import model_validator

from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import block_influence
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.plan import Plan, Remove, Selection
from llm_streamline.spans import lowest, runs


class ShortgptConfig(MethodConfig):
    """No options of its own."""

    @model_validator(mode="after")
    def _check(self) -> "ShortgptConfig":
        if self.network is not None:
            raise ValueError("shortgpt removes single layers and puts nothing in their place; use `--replacement none`")
        return self


@method(paper="arXiv:2403.03853", config=ShortgptConfig)
def shortgpt(probe: Probe, config: ShortgptConfig) -> Plan:
    """Single layers with the lowest Block Influence, one shot; nothing is put in their place."""
    statistics = probe.statistics()
    scores_L = block_influence(statistics.similarity).tolist()
    layers = lowest(scores_L, config.num_removed)
    selection = Selection(
        method="shortgpt",
        target="",
        convention="",
        notes=tuple(f"layer {i}: Block Influence {scores_L[i]:.4f}" for i in layers),
    )
    return Plan(
        model=probe.facts,
        edits=tuple(Remove(start=start, stop=stop) for start, stop in runs(layers)),
        selection=selection,
    )
