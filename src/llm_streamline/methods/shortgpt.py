"""ShortGPT (Men et al. 2024, arXiv:2403.03853): remove the layers that change the hidden state least."""

from llm_streamline.errors import ConfigError
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.scores import block_influence
from llm_streamline.methods.registry import MethodConfig, method
from llm_streamline.plan import Plan, Remove, Selection
from llm_streamline.spans import lowest, runs


@method(paper="arXiv:2403.03853", config=MethodConfig)
def shortgpt(probe: Probe, config: MethodConfig) -> Plan:
    """Single layers with the lowest Block Influence, one shot; nothing is put in their place."""
    if config.network is not None:
        raise ConfigError("shortgpt removes single layers and puts nothing in their place; use `--replacement none`")
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
