"""Starts that are computed from text: what each of them needs is summed up batch by batch, nothing is trained.

Shapes: B windows, T tokens of a window, N tokens of a batch, f inputs of a map, d width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_streamline.data.windows import Windows
from llm_streamline.logs import progress_bar
from llm_streamline.measure.edited import edited_view
from llm_streamline.measure.partial import run_tapped
from llm_streamline.measure.stream import WAY_OUT, batches
from llm_streamline.memory_limits import Portions
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
        OutOfMemoryError: if not even one window fits.
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


PairSums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def _summed(
    model: nn.Module,
    plan: Plan,
    replacements: list[Replacement],
    index: int,
    windows: Windows,
    settings: FitSettings,
    sums_of: PairSums,
) -> tuple[Tensor, ...]:
    """What `sums_of` makes of each batch, added up over all windows.

    It is given the state before the correction (N, d), the original's behind the span (N, d), weights (N,); all float64
    or 32.
    """
    replacement = replacements[index]
    for parameter in replacement.map.parameters():
        parameter.zero_()  # the identity: what is measured is what the correction will be given
    resumed = edited_view(model, plan, replacements)
    device = next(replacement.map.parameters()).device
    stop = replacement.edit.stop
    precise = torch.float32 if device.type == "mps" else torch.float64

    def measure(ids: Tensor) -> tuple[Tensor, ...]:
        inputs = {"input_ids": ids}
        states, _ = run_tapped(model, inputs, {resumed.at, stop}, stop)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.dtype != torch.float32):
            own, _ = resumed.run(inputs, states[resumed.at], replacement.out)
        target = states[stop].to(device).float()  # the layers of a spread model are on several devices
        weight = row_weights(target, settings.weighting)
        state = own[replacement.out].flatten(0, 1).to(device, precise)
        return sums_of(state, target.flatten(0, 1).to(precise), weight.flatten().to(precise))

    title, total = f"fitting the {replacement.kind}", ()
    portions = Portions(title, WAY_OUT)
    with progress_bar(title, len(windows)) as bar:
        for _, ids in batches(windows, settings.batch_tokens, device):
            for found in portions.run(ids, measure):
                total = tuple(one + more for one, more in zip(total, found, strict=True)) if total else found
            bar.advance(len(ids))
    return total


@torch.no_grad()
def _fit_mean(model, plan, replacements, index, windows, settings) -> None:
    """b = mean update of the span ("A deeper look at depth pruning", arXiv:2407.16286): the best constant."""

    def sums_of(state: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return (weight.unsqueeze(1) * (target - state)).sum(dim=0), weight.sum()

    total, weights = _summed(model, plan, replacements, index, windows, settings, sums_of)
    replacements[index].map.bias.copy_(total / weights)


@torch.no_grad()
def _fit_magnitude(model, plan, replacements, index, windows, settings) -> None:
    """The mean ratio of the state's norm behind the span to that before it (Prune&Comp, arXiv:2507.18212).

    The first token of a window counts like any other, unless `skip_first` leaves it out: a ratio has no scale.
    """

    def sums_of(state: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ratio = target.norm(dim=1) / state.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return ratio[weight > 0].sum(), (weight > 0).sum()

    total, count = _summed(model, plan, replacements, index, windows, settings, sums_of)
    replacements[index].map.log_scale.copy_((total / count).log())


@torch.no_grad()
def _fit_hadamard(model, plan, replacements, index, windows, settings) -> None:
    """P = H D H', D the ratio of mean absolute values in the rotated basis H (LinearPatch, arXiv:2505.24680)."""
    patch = replacements[index].map.map.weight  # P - 1
    basis = rotation(len(patch)).to(patch.device)

    def sums_of(state: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        share = weight.sqrt().unsqueeze(1)  # absolute values, where the weights are meant for squares
        turned = basis.to(state)
        return (share * (target @ turned).abs()).sum(dim=0), (share * (state @ turned).abs()).sum(dim=0)

    after, before = _summed(model, plan, replacements, index, windows, settings, sums_of)
    ratio = after / before.clamp_min(torch.finfo(torch.float32).tiny)
    basis = basis.to(ratio)
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
    portions = Portions("fitting by cosine", WAY_OUT)

    @torch.no_grad()
    def measure(ids: Tensor) -> tuple[Tensor, ...]:
        seen.clear()  # what an attempt that failed has left
        inputs = {"input_ids": ids}
        states, _ = run_tapped(model, inputs, {resumed.at, stop}, stop)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.dtype != torch.float32):
            own, _ = resumed.run(inputs, states[resumed.at], replacement.out)
        a = seen["a"].float().flatten(0, -2)
        target = states[stop].to(device).float()
        share = row_weights(target, "skip_first" if settings.weighting == "skip_first" else "uniform")
        rest = own[replacement.out].to(device).float().flatten(0, 1) - scale * seen["o"].float().flatten(0, -2)
        return a, target.flatten(0, 1), share.flatten(), rest

    with progress_bar("fitting by cosine", len(windows) * settings.epochs) as bar, _input_of(projection) as seen:
        for _ in range(settings.epochs):
            for _, ids in batches(windows, settings.batch_tokens, device):
                found = portions.run(ids, measure)  # joined again, so that Adam's steps stay the same
                a, target, share, rest = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
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
