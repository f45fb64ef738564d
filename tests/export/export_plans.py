"""Plans for tests: which layers of a model of so many to remove."""

from llm_streamline.plan import ModelFacts, Network, Plan, Remove, Replace


def facts(num_layers: int, hidden_size: int = 32, **changes) -> ModelFacts:
    settings = {"spec": "some/model", "fingerprint": "f", "model_type": "llama", "num_parameters": 1}
    return ModelFacts(num_layers=num_layers, hidden_size=hidden_size, **(settings | changes))


def removing(num_layers: int, *spans: tuple[int, int], hidden_size: int = 32) -> Plan:
    edits = tuple(Remove(start=start, stop=stop) for start, stop in spans)
    return Plan(model=facts(num_layers, hidden_size), edits=edits)


def replacing(num_layers: int, start: int, stop: int, hidden_size: int = 32) -> Plan:
    network = Network(kind="layer")
    edit = Replace(start=start, stop=stop, network=network, templates=(start,))
    return Plan(model=facts(num_layers, hidden_size), edits=(edit,))
