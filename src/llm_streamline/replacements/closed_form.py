"""Solving the last linear map of a replacement exactly, instead of training it from nothing.

Every network here ends in a linear map into the residual stream: y = rest + W a. With the rest held fixed, the W that
brings y closest to the removed layers' output is a ridge regression (ReplaceMe, arXiv:2505.02819; Ghosted Layers,
arXiv:2605.15491), whose two moments are collected batch by batch. Shapes: N tokens, f inputs of the map, d width.

Where an RMS norm stands behind the map (Gemma 2 and 3, OLMo 2, GLM 4), y = rest + g * (W a) / rms(W a). For any W the
divisor is one number a token: with each held at what it is at the start, V = diag(g) W is the ridge regression on the
inputs divided by it. V is then shared out: g takes the size of each channel, which leaves W one whose channels are all
of one size, so that its own divisor is near the one that was held. This is ours; no paper has it.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_streamline import ranks
from llm_streamline.arch import fold_obstacle, get_layers
from llm_streamline.data.windows import Windows
from llm_streamline.errors import ArchitectureError
from llm_streamline.layer_config import text_config
from llm_streamline.logs import progress_bar
from llm_streamline.measure.edited import edited_view
from llm_streamline.measure.partial import run_tapped
from llm_streamline.measure.stream import WAY_OUT, batches
from llm_streamline.memory_limits import Portions
from llm_streamline.plan import Plan
from llm_streamline.replacements.base import Replacement
from llm_streamline.replacements.layer import LayerReplacement
from llm_streamline.replacements.linear import LinearReplacement
from llm_streamline.replacements.mlp import MlpReplacement
from llm_streamline.replacements.stream import StreamReplacement

_ROWS = 2_048  # of the moments that a batch's product is made of at a time


@dataclass
class Moments:
    """Weighted second moments of a regression from a (N, f) to r (N, d), in float64."""

    num_inputs: int
    num_outputs: int
    device: torch.device
    aa: Tensor = field(init=False)  # (f, f)
    ar: Tensor = field(init=False)  # (f, d)
    weight: float = 0.0  # of all tokens together
    count: int = 0

    def __post_init__(self) -> None:
        # float64 is not to be had on every device
        where = self.device if self.device.type != "mps" else torch.device("cpu")
        self.aa = torch.zeros(self.num_inputs, self.num_inputs, dtype=torch.float64, device=where)
        self.ar = torch.zeros(self.num_inputs, self.num_outputs, dtype=torch.float64, device=where)

    def update(self, a: Tensor, r: Tensor, weight: Tensor) -> None:
        """Add tokens: a (N, f), r (N, d), weight (N,), all float32.

        All memory is taken before the first sum is touched: where it ends, none of these tokens has been added.
        """
        total = self.weight + float(weight.to(self.aa).sum())
        a, r = a.to(self.aa), r.to(self.aa)  # a product in float32 loses what a small ridge must still see
        weighted = a * weight.to(self.aa).unsqueeze(1)
        ar = weighted.T @ r
        part = self.aa.new_empty(min(_ROWS, self.num_inputs), self.num_inputs)
        for start in range(0, self.num_inputs, _ROWS):  # the whole product once more would be large
            rows = slice(start, start + _ROWS)
            self.aa[rows] += torch.mm(weighted[:, rows].T, a, out=part[: self.num_inputs - start])
        self.ar += ar
        self.weight = total
        self.count += len(a)

    def share(self) -> None:
        """Take in what the other ranks have seen."""
        self.aa, self.ar = ranks.summed(self.aa), ranks.summed(self.ar)
        self.count = sum(ranks.gathered(self.count))
        self.weight = math.fsum(ranks.gathered(self.weight))

    def pull(self, ridge: float) -> Tensor:
        """What is added to the diagonal for a `ridge`: relative to the mean weighted square of an input."""
        return ridge * self.aa.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)

    def solve(self, ridge: float, prior: Tensor | None = None, *, in_place: bool = False) -> Tensor:
        """The W (d, f) that minimises sum w |r - W a|^2 + ridge * mean(diag(aa)) * |W - prior|^2.

        Args:
            ridge: pull toward the prior, relative to the mean weighted square of an input; larger than 0.
            prior: (d, f); None is zero, which leaves the residual stream as it is.
            in_place: use up `aa`, so that no second matrix of its size is needed.
        """
        pull = self.pull(ridge)
        rest = self.ar if prior is None else self.ar - self.aa @ prior.T.to(self.ar)
        system = self.aa if in_place else self.aa.clone()  # large: the inner width of an MLP, squared
        system.diagonal().add_(pull)
        solution = torch.cholesky_solve(rest, torch.linalg.cholesky(system, out=system))
        return (solution if prior is None else solution + prior.T.to(self.ar)).T

    def channel_sizes(self, solution: Tensor, pull: Tensor) -> Tensor:
        """Root of the weighted mean square of each channel of W a, for a `solution` W (d, f) without prior: (d,).

        From diag(W aa W') = diag(W ar) - pull * diag(W W'), the normal equations: `aa` may have been used up.
        """
        power = (solution * self.ar.T).sum(dim=1) - pull * solution.square().sum(dim=1)
        return (power / self.weight).clamp_min(0).sqrt()


@torch.no_grad()
def solve_output_projection(
    model: nn.Module,
    plan: Plan,
    replacements: list[Replacement],
    index: int,
    windows: Windows,
    batch_tokens: int,
    ridge: float,
    weighting: str = "relative",
) -> None:
    """Set the last linear map of `replacements[index]`, and the norm behind it, by ridge regression, in place.

    By default each token counts by the inverse of its target's mean square, so that the massive activation of a first
    token does not rule the sums (specifications: findings 2).

    Args:
        model: the original.
        plan: the plan the replacements were built for.
        replacements: all of them; those before `index` are used as they are.
        index: the one to solve.
        windows: training windows.
        batch_tokens: tokens run at once.
        ridge: see `Moments.solve`.
        weighting: see `row_weights`.

    Raises:
        ArchitectureError: if the network's output is not linear in its last map, a norm behind it aside.
        OutOfMemoryError: if not even one window fits.
    """
    replacement = replacements[index]
    check_linear(model, replacement)
    scale = output_scale(model, replacement)
    projection, norm = replacement.output_projection(), norm_behind(replacement)
    has_bias = getattr(projection, "bias", None) is not None
    transposed = not isinstance(projection, nn.Linear)  # GPT-2 stores (in, out)
    num_outputs, num_inputs = reversed(projection.weight.shape) if transposed else projection.weight.shape
    device = projection.weight.device
    moments = Moments(num_inputs + has_bias, num_outputs, device)
    resumed = edited_view(model, plan, replacements)
    resume_at = resumed.at
    seen: dict[str, Tensor] = {}

    def keep(_module: nn.Module, args: tuple, output: Any) -> None:
        seen["a"], seen["o"] = args[0], output

    def keep_added(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen["added"] = output

    handles = [projection.register_forward_hook(keep), (norm or projection).register_forward_hook(keep_added)]

    def add(ids: Tensor, mine: bool) -> None:
        seen.clear()  # what an attempt that failed has left
        inputs, stop = {"input_ids": ids}, replacement.edit.stop
        states, _ = run_tapped(model, inputs, {resume_at, stop}, stop)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.dtype != torch.float32):
            own, _ = resumed.run(inputs, states[resume_at], replacement.out)
        a, added = (seen[name].float().flatten(0, -2) for name in ("a", "added"))  # OPT joins windows and tokens
        behind = states[stop].to(device).float()  # the layers of a spread model are on several devices
        weight, target = row_weights(behind, weighting).flatten(), behind.flatten(0, 1)
        without = own[replacement.out].to(device).float().flatten(0, 1) - scale * added
        if has_bias:
            a = torch.cat([a, torch.ones(len(a), 1, device=device)], dim=1)
        if norm is not None:
            a = a / _root_mean_square(seen["o"].float().flatten(0, -2))
        if mine:
            moments.update(a, (target - without) / scale, weight)

    portions = Portions("the closed form", WAY_OUT)
    try:
        with progress_bar("closed form", len(windows)) as bar:
            for (_, ids), mine in ranks.deal(batches(windows, batch_tokens, device)):
                portions.run(ids, partial(add, mine=mine))
                bar.advance(len(ids) * ranks.world_size())
    finally:
        for handle in handles:
            handle.remove()
    moments.share()
    prior = torch.eye(num_outputs) if isinstance(replacement, LinearReplacement) else None
    pull = moments.pull(ridge)
    solution = moments.solve(ridge, prior, in_place=True)
    if norm is not None:
        sizes = moments.channel_sizes(solution, pull)
        norm.weight.copy_(sizes + replacement.arch.silent_norm_weight)
        solution = torch.where(sizes > 0, 1 / sizes, 0).unsqueeze(1) * solution
    weight = solution[:, :num_inputs]
    projection.weight.copy_(weight.T if transposed else weight)
    if has_bias:
        projection.bias.copy_(solution[:, -1])


def _root_mean_square(states: Tensor) -> Tensor:
    """What an RMS norm divides each token by: (N, d) -> (N, 1)."""
    return states.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).eps)


def norm_behind(replacement: Replacement) -> nn.Module | None:
    """The norm between the last linear map of a network of decoder layers and the residual stream, if there is one."""
    path = replacement.arch.mlp_norm_out
    return replacement.layers[-1].get_submodule(path) if path and isinstance(replacement, LayerReplacement) else None


def row_weights(target: Tensor, weighting: str) -> Tensor:
    """How much each token counts in a sum of squares: (B, T, d) states behind the span -> (B, T).

    Args:
        target: the original's states.
        weighting: uniform: alike, as in the papers; relative: by the inverse of the target's mean square; skip_first:
            alike, without the first token of a window.
    """
    if weighting == "relative":
        return 1 / target.square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    weights = torch.ones(target.shape[:-1], dtype=target.dtype, device=target.device)
    if weighting == "skip_first":
        weights[:, 0] = 0
    return weights


def output_scale(model: nn.Module, replacement: Replacement) -> float:
    """Factor between what the output projection puts out and what it adds to the stream (Granite's own layers)."""
    if isinstance(replacement, StreamReplacement | MlpReplacement):
        return 1.0
    return getattr(text_config(model.config), "residual_multiplier", 1.0)


def check_linear(model: nn.Module, replacement: Replacement) -> None:
    """Raise ArchitectureError if the state behind the network is not linear in its output projection.

    A norm behind the last layer of a network of layers is no obstacle: it is solved for as well.
    """
    if isinstance(replacement, StreamReplacement | MlpReplacement):
        return  # they add what the map puts out
    layer = get_layers(model)[
        replacement.edit.templates[0] if replacement.edit.templates else replacement.edit.start - 1
    ]
    arch = replacement.arch
    if norm_behind(replacement) is not None:
        arch = dataclasses.replace(arch, mlp_norm_out=None)
    obstacle = fold_obstacle(layer, arch)
    if obstacle:
        raise ArchitectureError(
            f"no closed form for this {arch.model_type}: {obstacle}; use init first, average or identity"
        )
