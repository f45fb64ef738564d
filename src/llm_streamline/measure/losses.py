"""Next-token losses in float32 without a float32 copy of all logits. Shapes: B windows, T tokens, V vocabulary."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 512  # logits are taken to float32 this many positions at a time: V is large


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of each next token: (B, T, V) logits and (B, T) ids -> (B, T - 1) nats."""
    targets = input_ids[:, 1:].long()
    flat = logits[:, :-1].flatten(0, 1)
    losses = in_chunks(_cross_entropy, flat, targets.flatten())
    return losses.view(targets.shape)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def in_chunks(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """Apply `function` to pieces of positions; the float32 copies of one piece at a time are all that is ever alive."""
    pieces = []
    for logits_piece, other_piece in zip(logits.split(CHUNK_TOKENS), other.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled() and logits_piece.requires_grad:
            pieces.append(checkpoint(function, logits_piece, other_piece, use_reentrant=False))
        else:
            pieces.append(function(logits_piece, other_piece))
    return torch.cat(pieces)
