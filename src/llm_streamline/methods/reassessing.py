"""Reassessing Layer Pruning in LLMs (Lu et al. 2024, arXiv:2411.15558): seven ways to score a layer, the tail cut one.

`tail` deletes the last layers ("reverse order"), which the paper finds best when the head and the last layers that are
left are trained afterwards; UIDL and ShortGPT find the last layer the costliest to lose when nothing is trained.
Nothing is protected, and everything leaves at once.

Where the authors' code differs: it takes one cosine over a flattened batch for `bi` and never scores the last layer,
and adds up signed gradients over batches for `taylor`; here `bi` is ShortGPT's and `taylor` that of shortened_llama.
"""

from pydantic import Field, PositiveInt, model_validator

from llm_streamline.measure.probe import Probe
from llm_streamline.methods.choosing import refuse_network
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.methods.single_layers import Metric, remove_lowest, score_layers
from llm_streamline.plan import Plan


class ReassessingConfig(MethodConfig):
    """The metric. `verify` is not used."""

    metric: Metric = Field("tail", description="what a layer's importance is taken for; the lowest leave")
    gradient_tokens: PositiveInt = Field(8_192, description="calibration tokens that taylor is measured on")

    @model_validator(mode="after")
    def _check(self) -> "ReassessingConfig":
        refuse_network("reassessing", self.network)
        return self


@method(paper="arXiv:2411.15558", config=ReassessingConfig, replacement={"kind": "none"})
def reassessing(probe: Probe, config: ReassessingConfig) -> Plan:
    """The last layers, or single layers by random order, magnitude, Taylor score, perplexity or Block Influence."""
    config.check_fits(probe.facts.num_layers)
    scores = score_layers(probe, config.metric, range(probe.facts.num_layers), config.gradient_tokens)
    return remove_lowest(probe, scores, config.num_removed, "reassessing", [f"metric {config.metric}"])
