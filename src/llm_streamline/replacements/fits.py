"""Starts that are computed from text: what each of them needs is summed up batch by batch, nothing is trained.

Shapes: B windows, T tokens of a window, N tokens of a batch, f inputs of a map, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_streamline.data.windows import Windows
from llm_streamline.logs import progress_bar
from llm_streamline.measure.edited import edited_view
from llm_streamline.measure.partial import run_tapped
from llm_streamline.measure.stream import batches
from llm_streamline.plan import Plan
from llm_streamline.replacements.base import Replacement
from llm_streamline.replacements.closed_form import check_linear, output_scale, row_weights, solve_output_projection
from llm_streamline.replacements.hadamard import rotation
from llm_streamline.replacements.linear import LinearReplacement
from llm_streamline.replacements.stream import StreamReplacement

_COSINE_BATCH = 1_024  # tokens for one step of Adam, as in ReplaceMe


@dataclass(frozen=True)
class FitSettings:
    """How starts are fitted; the fields are those of the recipe's `replacement`."""

    batch_tokens: int
    ridge: float
    weighting: str
    epochs: int
    learning_rate: float


def fitted_starts(replacement: Replacement) -> tuple[str, ...]:
    """The starts of this network that are fitted to text, in the order in which `best` tries them."""
    if isinstance(replacement, StreamReplacement):
        return {"patch": ("closed_form", "hadamard", "cosine"), "bias": ("mean",), "scale": ("magnitude",)}[
            replacement.kind
        ]
    return ("closed_form", "cosine") if isinstance(replacement, LinearReplacement) else ("closed_form",)


def fit(
    model: nn.Module,
    plan: Plan,
    replacements: list[Replacement],
    index: int,
    init: str,
    windows: Windows,
    settings: FitSettings,
) -> None:
    """Give `replacements[index]` the start `init`, in place; those before it are used as they are.

    Args:
        model: the original.
        plan: the plan the replacements were built for.
        replacements: all of them.
        index: the one to fit.
        init: one of its `fitted_starts`.
        windows: training windows.
        settings: how.

    Raises:
        ArchitectureError: if the network's output is not linear in its last map.
    """
    if init == "closed_form":
        solve_output_projection(
            model, plan, replacements, index, windows, settings.batch_tokens, settings.ridge, settings.weighting
        )
    elif init == "cosine":
        _fit_cosine(model, plan, replacements, index, windows, settings)
    else:
        _FITS[init](model, plan, replacements, index, windows, settings)


# --- corrections of the stream: sums over pairs of states


def _pairs(
    model: nn.Module, plan: Plan, replacements: list[Replacement], index: int, windows: Windows, settings: FitSettings
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """State before the correction (N, d), the original's behind the span (N, d), weights (N,); all float64 or 32."""
    replacement = replacements[index]
    for parameter in replacement.map.parameters():
        parameter.zero_()  # the identity: what is measured is what the correction will be given
    resumed = edited_view(model, plan, replacements)
    device = next(replacement.map.parameters()).device
    stop = replacement.edit.stop
    with progress_bar(f"fitting the {replacement.kind}", len(windows)) as bar:
        for _, ids in batches(windows, settings.batch_tokens, device):
            inputs = {"input_ids": ids}
            states, _ = run_tapped(model, inputs, {resumed.at, stop}, stop)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.dtype != torch.float32):
                own, _ = resumed.run(inputs, states[resumed.at], replacement.out)
            target = states[stop].float()
            weight = row_weights(target, settings.weighting)
            precise = torch.float32 if device.type == "mps" else torch.float64
            state = own[replacement.out].flatten(0, 1).to(precise)
            yield state, target.flatten(0, 1).to(precise), weight.flatten().to(precise)
            bar.advance(len(ids))


@torch.no_grad()
def _fit_mean(model, plan, replacements, index, windows, settings) -> None:
    """b = mean update of the span ("A deeper look at depth pruning", arXiv:2407.16286): the best constant."""
    total, weights = 0.0, 0.0
    for state, target, weight in _pairs(model, plan, replacements, index, windows, settings):
        total = total + (weight.unsqueeze(1) * (target - state)).sum(dim=0)
        weights = weights + weight.sum()
    replacements[index].map.bias.copy_(total / weights)


@torch.no_grad()
def _fit_magnitude(model, plan, replacements, index, windows, settings) -> None:
    """The mean ratio of the state's norm behind the span to that before it (Prune&Comp, arXiv:2507.18212).

    The first token of a window counts like any other, unless `skip_first` leaves it out: a ratio has no scale.
    """
    total, count = 0.0, 0
    for state, target, weight in _pairs(model, plan, replacements, index, windows, settings):
        ratio = target.norm(dim=1) / state.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        total, count = total + ratio[weight > 0].sum(), count + int((weight > 0).sum())
    replacements[index].map.log_scale.copy_((total / count).log())


@torch.no_grad()
def _fit_hadamard(model, plan, replacements, index, windows, settings) -> None:
    """P = H D H', D the ratio of mean absolute values in the rotated basis H (LinearPatch, arXiv:2505.24680)."""
    patch = replacements[index].map.map.weight  # P - 1
    basis = rotation(len(patch)).to(patch.device)
    after, before = 0.0, 0.0
    for state, target, weight in _pairs(model, plan, replacements, index, windows, settings):
        basis = basis.to(state)
        share = weight.sqrt().unsqueeze(1)  # absolute values, where the weights are meant for squares
        after = after + (share * (target @ basis).abs()).sum(dim=0)
        before = before + (share * (state @ basis).abs()).sum(dim=0)
    ratio = after / before.clamp_min(torch.finfo(torch.float32).tiny)
    patch.copy_(basis @ torch.diag(ratio - 1) @ basis.T)


_FITS = {"mean": _fit_mean, "magnitude": _fit_magnitude, "hadamard": _fit_hadamard}


# --- the cosine objective


def _fit_cosine(model, plan, replacements, index, windows, settings) -> None:
    """ReplaceMe's cosine objective: Adam on the map alone, from the identity, 1 - cos(rest + W a, target) a token.

    Activations are made anew in each epoch, so that no more than a batch of them is ever in memory.
    """
    replacement = replacements[index]
    check_linear(model, replacement)
    projection = replacement.output_projection()
    with torch.no_grad():
        if isinstance(replacement, LinearReplacement):
            nn.init.eye_(projection.weight)
        else:
            projection.weight.zero_()
    resumed = edited_view(model, plan, replacements)
    weight = projection.weight.detach().clone().requires_grad_(True)
    adam = torch.optim.Adam([weight], lr=settings.learning_rate)
    scale = output_scale(model, replacement)
    device, stop = weight.device, replacement.edit.stop
    with progress_bar("fitting by cosine", len(windows) * settings.epochs) as bar, _input_of(projection) as seen:
        for _ in range(settings.epochs):
            for _, ids in batches(windows, settings.batch_tokens, device):
                inputs = {"input_ids": ids}
                with torch.no_grad():
                    states, _ = run_tapped(model, inputs, {resumed.at, stop}, stop)
                    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.dtype != torch.float32):
                        own, _ = resumed.run(inputs, states[resumed.at], replacement.out)
                    a = seen["a"].float().flatten(0, -2)
                    target = states[stop].float()
                    share = row_weights(target, "skip_first" if settings.weighting == "skip_first" else "uniform")
                    target, share = target.flatten(0, 1), share.flatten()
                    rest = own[replacement.out].float().flatten(0, 1) - scale * seen["o"].float().flatten(0, -2)
                for rows in torch.arange(len(a), device=device).split(_COSINE_BATCH):
                    found = rest[rows] + scale * a[rows] @ weight.T
                    cosine = nn.functional.cosine_similarity(found, target[rows], dim=-1)
                    loss = (share[rows] * (1 - cosine)).sum() / share[rows].sum().clamp_min(1)
                    (weight.grad,) = torch.autograd.grad(loss, weight)
                    adam.step()
                bar.advance(len(ids))
    with torch.no_grad():
        projection.weight.copy_(weight)


@contextmanager
def _input_of(projection: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While open, the dictionary holds the input `a` and the output `o` of the projection's latest call."""
    seen: dict[str, Tensor] = {}

    def keep(_module: nn.Module, args: tuple, output: Any) -> None:
        seen["a"], seen["o"] = args[0], output

    handle = projection.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
