"""Shortened LLaMA (Kim et al. 2024, arXiv:2402.02834): score every layer by itself, remove the lowest at once.

`criterion` is the paper's PPL (held-out loss without the layer), Taylor+ (sum of |w dL/dw|) or Magnitude+ (sum of |w|).
The "+", the first four and last two layers stay, is an option. The authors rank by 1,280 tokens, where neighbouring
ranks are noise; here the plan names, for every layer removed, the ranks that other windows might have given it.
"""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from llm_streamline.measure.probe import Probe
from llm_streamline.methods.choosing import refuse_network, unprotected
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.methods.single_layers import remove_lowest, score_layers
from llm_streamline.plan import Plan

_METRICS = {"ppl": "ppl", "taylor": "taylor", "magnitude": "magnitude_l1"}


class ShortenedLlamaConfig(MethodConfig):
    """Options of the score. `verify` is not used."""

    criterion: Literal["ppl", "taylor", "magnitude"] = "ppl"
    protect_first: NonNegativeInt = Field(4, description="layers at the beginning that stay")
    protect_last: NonNegativeInt = Field(2, description="layers at the end that stay")
    gradient_tokens: PositiveInt = Field(8_192, description="calibration tokens that taylor is measured on")

    @model_validator(mode="after")
    def _check(self) -> "ShortenedLlamaConfig":
        refuse_network("shortened_llama", self.network)
        return self

    def check_fits(self, num_layers: int) -> None:
        """Refuse more layers than are not protected."""
        super().check_fits(num_layers)
        unprotected(num_layers, self.num_removed, self.protect_first, self.protect_last)


@method(paper="arXiv:2402.02834", config=ShortenedLlamaConfig, replacement={"kind": "none"})
def shortened_llama(probe: Probe, config: ShortenedLlamaConfig) -> Plan:
    """Single layers with the lowest perplexity without them, Taylor score or magnitude, one shot."""
    config.check_fits(probe.facts.num_layers)
    free = unprotected(probe.facts.num_layers, config.num_removed, config.protect_first, config.protect_last)
    scores = score_layers(probe, _METRICS[config.criterion], free, config.gradient_tokens)
    note = f"the first {config.protect_first} and last {config.protect_last} layers were protected"
    return remove_lowest(probe, scores, config.num_removed, "shortened_llama", [note])
