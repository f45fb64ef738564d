"""A linear map in place of a span, folded into the projection before it: no layer and no parameter is added.

ReplaceMe (arXiv:2505.02819): the MLP output M of the layer before the span is mapped by T, so that the residual stream
becomes what the removed layers would have made of it; T is then multiplied into that MLP's last projection.
"""

import copy

import torch
from torch import Tensor, nn

from llm_streamline.arch import ArchSpec, fold_obstacle, get_layers, mlp_facts
from llm_streamline.errors import ArchitectureError
from llm_streamline.offload import is_streamed, own_copy
from llm_streamline.plan import Plan, Replace
from llm_streamline.replacements.base import Replacement


class MappedProjection(nn.Module):
    """A frozen projection followed by a trainable map: y = T (W x + b). Shapes: x (..., w), T (d, d), y (..., d)."""

    def __init__(self, projection: nn.Module, hidden_size: int):
        super().__init__()
        self._projection = (projection,)  # shared with the original model: not saved, not trained
        self.map = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.eye_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply projection and map."""
        return self.map(self._projection[0](x))


class LinearReplacement(Replacement):
    """T of ReplaceMe, started as the identity, which is plain removal."""

    def __init__(self, model: nn.Module, plan: Plan, edit: Replace, arch: ArchSpec):
        super().__init__(plan, edit, arch)
        before = get_layers(model)[plan.layer_sources()[self.position - 1]]
        obstacle = fold_obstacle(before, arch)
        if obstacle:
            raise ArchitectureError(f"a linear map cannot be folded into this {arch.model_type}: {obstacle}")
        if is_streamed(before):
            before = own_copy(before)  # its projection is used while the layer itself is on disk
        self.resume_at = self.position - 1
        self._down = mlp_facts(before, arch).down
        projection = before.get_submodule(self._down)
        self.mapped = MappedProjection(projection, model.get_input_embeddings().weight.shape[1])
        self.mapped.to(projection.weight.device)
        self._layer = (_with_module(before, self._down, self.mapped),)

    def patches(self) -> dict[int, nn.Module]:
        """The layer before the span, with the map behind its last projection."""
        return {self.position - 1: self._layer[0]}

    def output_projection(self) -> nn.Module:
        """The map itself."""
        return self.mapped.map

    @torch.no_grad()
    def install(self, model: nn.Module) -> None:
        """Multiply the map into the projection: W <- T W, b <- T b, in float32."""
        before = get_layers(model)[self.position - 1]
        facts = mlp_facts(before, self.arch)
        projection = before.get_submodule(facts.down)
        weight = projection.weight.float().T if facts.transposed else projection.weight.float()  # (d, w)
        t = self.mapped.map.weight.float().to(weight.device)
        folded = t @ weight
        projection.weight.copy_(folded.T if facts.transposed else folded)
        if projection.bias is not None:
            projection.bias.copy_(t @ projection.bias.float())


def _with_module(layer: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """A layer that shares everything with `layer` but the sub-module at `path`."""
    clone = copy.copy(layer)
    clone._modules = dict(layer._modules)
    name, _, rest = path.partition(".")
    clone._modules[name] = _with_module(layer._modules[name], rest, module) if rest else module
    return clone
