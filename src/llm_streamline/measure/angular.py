"""Angles between the states of the last token of every window, at every pair of boundaries; one streamed pass.

Shapes: L layers, boundaries 0..L (L is before the final norm), B windows, T tokens, d width, G groups of windows.
Angles are computed and summed in float64: near zero the cosine of a small angle is all ones in half precision.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_streamline.errors import NoDataError
from llm_streamline.measure.stats import NUM_GROUPS, check_finite


@dataclass
class AngularStats:
    """Sums of angular distances in [0, 1]: 0 the same direction, 0.5 orthogonal, 1 opposite."""

    num_layers: int
    group_sum: Tensor = field(init=False)  # (G, L+1, L+1) float64
    group_count: Tensor = field(init=False)  # (G,) float64, windows

    def __post_init__(self) -> None:
        size = self.num_layers + 1
        self.group_sum = torch.zeros(NUM_GROUPS, size, size, dtype=torch.float64)
        self.group_count = torch.zeros(NUM_GROUPS, dtype=torch.float64)

    @property
    def boundaries(self) -> range:
        """The boundaries whose states `update` needs."""
        return range(self.num_layers + 1)

    def update(self, states: list[Tensor], mask: Tensor | None, first_window: int) -> None:
        """Add a batch: the last real token of each window, wherever its padding is.

        Args:
            states: L+1 tensors (B, T, d).
            mask: (B, T), true for real tokens; None when there is no padding.
            first_window: index of the batch's first window in the whole set, for the groups.

        Raises:
            NumericsError: if a state is not finite; the message names the layer.
        """
        for row in range(len(states[0])):
            real = torch.arange(states[0].shape[1]) if mask is None else mask[row].nonzero().flatten()
            if len(real):
                last = torch.stack([state[row, int(real[-1])] for state in states]).double().cpu()  # (L+1, d)
                group = (first_window + row) % NUM_GROUPS
                self.group_sum[group] += angular_distances(last)
                self.group_count[group] += 1

    def merge(self, other: "AngularStats") -> None:
        """Add what another pass over other windows has seen."""
        self.group_sum = self.group_sum + other.group_sum
        self.group_count = self.group_count + other.group_count

    @property
    def distance(self) -> Tensor:
        """(L+1, L+1) float64 mean angular distance over windows.

        Raises:
            NoDataError: if no window was seen.
        """
        if not self.group_count.sum():
            raise NoDataError("no calibration token reached the layers; is the text empty, or all of it padding?")
        return self.group_sum.sum(dim=0) / self.group_count.sum()


def angular_distances(states: Tensor) -> Tensor:
    """Angle between every pair of rows over pi: (n, d) -> (n, n) in [0, 1].

    UIDL (arXiv:2403.17887): arccos(cosine) / pi, by Kahan's formula 2 atan2(|u - v|, |u + v|), which is
    exact where the cosine is near one and arccos is not. A row of zeros has no direction: it counts as orthogonal.

    Raises:
        NumericsError: if a row is not finite.
    """
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    check_finite(norms)
    units = states / norms.clamp_min(torch.finfo(states.dtype).tiny)
    rows = [
        torch.atan2(torch.linalg.vector_norm(units - u, dim=-1), torch.linalg.vector_norm(units + u, dim=-1))
        for u in units
    ]
    return 2 / math.pi * torch.stack(rows)
