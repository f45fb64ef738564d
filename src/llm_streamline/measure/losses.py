"""Losses over a vocabulary in float32, without a float32 copy of all logits.

Logits are taken to float32 a few positions at a time, so that a piece stays in the processor's cache: the speed of a
loss over a large vocabulary depends on it. Gradients are made piece by piece in the same go, so that nothing is
kept or computed twice for the backward. Shapes: B windows, T tokens, N positions, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PieceLoss = Callable[[Tensor, Tensor], Tensor]  # logits (n, V) and something else (n, ...) -> (n,)
_PIECE_ELEMENTS = 1 << 21  # float32 values of a piece on the CPU: 8 MB
_PIECE_ELEMENTS_DEVICE = 1 << 26  # an accelerator wants fewer, larger kernels


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of each next token: (B, T, V) logits and (B, T) ids -> (B, T - 1) nats, without gradient."""
    targets = input_ids[:, 1:].long()
    rows = [
        torch.cat([cross_entropy(piece, wanted) for piece, wanted in _pieces(logits[b, :-1], targets[b])])
        for b in range(len(logits))
    ]
    return torch.stack(rows).detach()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, V) logits and (n,) ids -> (n,) nats."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def mean_loss(function: PieceLoss, logits: Tensor, other: Tensor) -> Tensor:
    """Mean of `function` over all positions, with gradient toward `logits`.

    Args:
        function: loss of each of a few positions; it is given float or half logits and must work in float32.
        logits: (B, T, V).
        other: (B, T, ...), what the logits are compared with; no gradient.

    Returns:
        Scalar, float32.
    """
    return _MeanLoss.apply(logits, other, function)


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, other: Tensor, function: PieceLoss) -> Tensor:
        count = logits.shape[0] * logits.shape[1]
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64 if logits.device.type == "cpu" else torch.float32)
        total = total.to(logits.device)
        for b in range(len(logits)):
            start = 0
            for piece, compared in _pieces(logits[b], other[b]):
                with torch.set_grad_enabled(gradient is not None):
                    piece = piece.detach().float().requires_grad_(gradient is not None)
                    loss = function(piece, compared).sum() / count
                if gradient is not None:
                    stop = start + len(piece)
                    gradient[b, start:stop] = torch.autograd.grad(loss, piece)[0]
                    start = stop
                total += loss.detach()
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream if gradient is not None else None), None, None


def _pieces(logits: Tensor, other: Tensor):
    budget = _PIECE_ELEMENTS if logits.device.type == "cpu" else _PIECE_ELEMENTS_DEVICE
    size = max(1, budget // logits.shape[-1])
    return zip(logits.split(size), other.to(logits.device).split(size), strict=True)
