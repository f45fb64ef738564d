"""Which sublayers a plan silences, and why one cannot be: attention or MLP that adds exactly nothing."""

from torch import nn
from transformers import PreTrainedModel

from llm_streamline.arch import ArchSpec, find_arch, get_layers, silencing
from llm_streamline.errors import ArchitectureError
from llm_streamline.plan import Part, Plan, Silence


def silences(model: PreTrainedModel, plan: Plan) -> list[Silence]:
    """The plan's edits of this kind.

    Raises:
        ArchitectureError: if one of them cannot be made; the message says why.
    """
    edits = [edit for edit in plan.edits if isinstance(edit, Silence)]
    if edits:
        arch, layers = find_arch(model), get_layers(model)
        for edit in edits:
            for index in edit.templates:
                check_silence(layers[index], arch, edit.part, index)
    return edits


def check_silence(layer: nn.Module, arch: ArchSpec, part: Part, index: int) -> None:
    """Refuse a sublayer that cannot be silenced.

    Raises:
        ArchitectureError: if there is none, no weights silence it, or its weights are not in memory.
    """
    names = silencing(layer, arch, part)
    if not names:
        raise ArchitectureError(f"layer {index} of this {arch.model_type} has no {part} of its own to silence")
    weights = [layer.get_parameter(name) for name in names]
    if any(weight.is_meta or not weight.is_floating_point() for weight in weights):
        kind = "offloaded" if any(weight.is_meta for weight in weights) else "quantised"
        raise ArchitectureError(f"layer {index} is {kind}, so that its {part} cannot be silenced")
