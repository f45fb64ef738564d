"""What every replacement network has in common.

A replacement is a module whose parameters are the only ones that training touches. It says where it stands in the
edited model (`patches`), from which boundary the edited model differs from the original (`resume_at`), and how it is
put into the final checkpoint (`install`), as stock layers whenever that is exact.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import nn

from llm_streamline.arch import ArchSpec, get_layers
from llm_streamline.offload import weights_in_memory
from llm_streamline.packed import plain_copy
from llm_streamline.plan import Plan, Replace


class Replacement(nn.Module, ABC):
    """A network in place of one span of layers.

    Attributes:
        edit: what the plan says.
        position: index in the edited model of the first layer that stands in for the span.
        resume_at: boundary below which edited and original model are the same.
        out: boundary of the edited model at which the network's output is to be found.
    """

    def __init__(self, plan: Plan, edit: Replace, arch: ArchSpec):
        super().__init__()
        self.edit, self.arch = edit, arch
        self.position = plan.position_of(edit)
        self.resume_at = self.position
        self.out = self.position + len(edit.templates)

    @property
    def install_order(self) -> int:
        """0: weights of its own; larger: added to the weights that stand there after all smaller ones and healing."""
        return 0

    @abstractmethod
    def patches(self) -> dict[int, nn.Module]:
        """Position in the edited model -> module to stand there while the replacement is trained."""

    @abstractmethod
    def install(self, model: nn.Module) -> None:
        """Put the trained weights into `model`, whose structure has been edited by the plan already."""

    @abstractmethod
    def output_projection(self) -> nn.Module:
        """The last linear map before the residual stream, which a closed-form start solves for."""

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Names and parameters that training changes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for _, p in self.trainable())


def master_copy(layer: nn.Module, trainable: bool = True) -> nn.Module:
    """A deep copy of a layer in float32, without the original's hooks, to be trained."""
    clone = plain_copy(layer)
    for module in clone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    clone.float()
    clone.requires_grad_(trainable)
    return clone.train(False)  # no dropout: the network is fitted to a deterministic target


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy every weight of `source` into `target`, cast to the target's dtype and device.

    Raises:
        KeyError: if the two do not have the same parameters: a mistake of ours.
    """
    theirs = dict(target.named_parameters()) | dict(target.named_buffers())
    with weights_in_memory(source):
        for name, value in (dict(source.named_parameters()) | dict(source.named_buffers())).items():
            theirs[name].copy_(value)


def layers_at(model: nn.Module, replacement: Replacement) -> list[nn.Module]:
    """The layers of the edited `model` that stand in for the replacement's span."""
    return list(get_layers(model)[replacement.position : replacement.out])
