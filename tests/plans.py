"""Plans and windows for tests, without any file."""

import torch
from tiny import tiny_tokens

from llm_streamline.arch import get_layers
from llm_streamline.data.windows import Windows
from llm_streamline.layer_config import text_config
from llm_streamline.plan import ModelFacts, Network, Plan, Remove, Replace, templates_for


def facts_of(model) -> ModelFacts:
    config = text_config(model.config)
    return ModelFacts(
        spec="tiny",
        fingerprint="0" * 64,
        model_type=config.model_type,
        num_layers=len(get_layers(model)),
        hidden_size=config.hidden_size,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def facts(num_layers: int = 8, **changes) -> ModelFacts:
    settings = {
        "spec": "tiny",
        "fingerprint": "f" * 64,
        "model_type": "llama",
        "num_layers": num_layers,
        "hidden_size": 32,
        "num_parameters": 1000,
    }
    return ModelFacts(**(settings | changes))


def removing(model, start: int, stop: int) -> Plan:
    return Plan(model=facts_of(model), edits=(Remove(start=start, stop=stop),))


def replace(start: int, stop: int, kind: str = "layer", **network) -> Replace:
    network = Network(kind=kind, **network)
    return Replace(start=start, stop=stop, network=network, templates=templates_for(network, start, stop))


def replacing(model, start: int, stop: int, kind: str = "layer", **network) -> Plan:
    return Plan(model=facts_of(model), edits=(replace(start, stop, kind, **network),))


def tiny_windows(count: int = 4, seq_len: int = 16, *, seed: int = 0) -> Windows:
    return Windows(input_ids=tiny_tokens(count, seq_len, seed=seed).to(torch.int32), provenance={"sha256": str(seed)})
