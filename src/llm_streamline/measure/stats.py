"""Statistics of one streamed pass: sums that are updated batch by batch, so memory does not grow with tokens.

Shapes: L layers, boundaries 0..L (the state entering layer b; L is what leaves the last layer before the final norm),
B windows, T tokens, d width, G groups of windows. Cosines are computed in float32, sums are kept in float64.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_streamline.errors import NoDataError, NumericsError

NUM_GROUPS = 64  # windows are dealt into this many groups for the bootstrap: bounded memory, however many windows
_CHUNK_TOKENS = 128  # states are normalised this many tokens at a time: few enough to stay in the cache
_BLOCK_TOKENS = 16  # a float32 sum runs over at most this many tokens before it goes to float64


@dataclass
class CosineStats:
    """Cosine between the states at every pair of boundaries, summed over real tokens.

    The first token of a window is kept apart: in most models it carries a massive activation, hundreds of times longer
    than the other states, that one token in hundreds cannot show in a mean (specifications: findings 1).
    """

    num_layers: int
    cosine_sum_first: Tensor = field(init=False)  # (L+1, L+1) float64
    cosine_sum_rest: Tensor = field(init=False)  # (L+1, L+1) float64
    group_cosine_sum: Tensor = field(init=False)  # (G, L+1, L+1) float64, all tokens
    group_count: Tensor = field(init=False)  # (G,) float64
    norm_sum_first: Tensor = field(init=False)  # (L+1,) float64
    norm_sum_rest: Tensor = field(init=False)  # (L+1,) float64
    norm_max: Tensor = field(init=False)  # (L+1,) float64
    count_first: int = 0
    count_rest: int = 0

    def __post_init__(self) -> None:
        size = self.num_layers + 1
        for name in ("cosine_sum_first", "cosine_sum_rest"):
            setattr(self, name, torch.zeros(size, size, dtype=torch.float64))
        for name in ("norm_sum_first", "norm_sum_rest", "norm_max"):
            setattr(self, name, torch.zeros(size, dtype=torch.float64))
        self.group_cosine_sum = torch.zeros(NUM_GROUPS, size, size, dtype=torch.float64)
        self.group_count = torch.zeros(NUM_GROUPS, dtype=torch.float64)

    @property
    def boundaries(self) -> range:
        """The boundaries whose states `update` needs."""
        return range(self.num_layers + 1)

    def update(self, states: list[Tensor], mask: Tensor | None, first_window: int) -> None:
        """Add a batch.

        Args:
            states: L+1 tensors (B, T, d), any floating dtype.
            mask: (B, T), true for real tokens; None when there is no padding, on either side.
            first_window: index of the batch's first window in the whole set, for the groups.

        Raises:
            NumericsError: if a state is not finite; the message names the layer.
        """
        for row in range(states[0].shape[0]):
            real = None if mask is None else mask[row].bool()
            rows = [state[row] if real is None else state[row][real] for state in states]  # each (n, d)
            if rows[0].shape[0]:
                self._update_window(rows, (first_window + row) % NUM_GROUPS)

    def _update_window(self, rows: list[Tensor], group: int) -> None:
        num_tokens = rows[0].shape[0]
        for start in range(0, num_tokens, _CHUNK_TOKENS):
            states = torch.stack([row[start : start + _CHUNK_TOKENS] for row in rows]).float()  # (L+1, n, d)
            norms = torch.linalg.vector_norm(states, dim=-1)  # (L+1, n)
            check_finite(norms)
            # a state of length zero has no direction: its cosine counts as 0 with everything but itself
            units = states.div_(norms.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1))
            norms = norms.double().cpu()
            self.norm_max = torch.maximum(self.norm_max, norms.amax(dim=1))
            if start == 0:
                self._add_first(units[:, :1], norms[:, 0], group)
                units, norms = units[:, 1:], norms[:, 1:]
            self._add_rest(units, norms, group)
        self.group_count[group] += num_tokens

    def _add_first(self, units: Tensor, norms: Tensor, group: int) -> None:
        cosines = _gram(units)
        self.cosine_sum_first += cosines
        self.group_cosine_sum[group] += cosines
        self.norm_sum_first += norms
        self.count_first += 1

    def _add_rest(self, units: Tensor, norms: Tensor, group: int) -> None:
        cosines = _gram(units)
        self.cosine_sum_rest += cosines
        self.group_cosine_sum[group] += cosines
        self.norm_sum_rest += norms.sum(dim=1)
        self.count_rest += units.shape[1]

    def merge(self, other: "CosineStats") -> None:
        """Add what another pass over other windows has seen."""
        for name in self.tensors():
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, torch.maximum(mine, theirs) if name == "norm_max" else mine + theirs)
        self.count_first += other.count_first
        self.count_rest += other.count_rest

    @property
    def num_tokens(self) -> int:
        """Real tokens seen."""
        return self.count_first + self.count_rest

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the counts, by name."""
        names = ("cosine_sum_first", "cosine_sum_rest", "group_cosine_sum", "group_count")
        return {name: getattr(self, name) for name in (*names, "norm_sum_first", "norm_sum_rest", "norm_max")}

    def require_data(self) -> "CosineStats":
        """Return self.

        Raises:
            NoDataError: if no token was seen.
        """
        if self.num_tokens == 0:
            raise NoDataError("no calibration token reached the layers; is the text empty, or all of it padding?")
        return self


def _gram(units: Tensor) -> Tensor:
    """Sum over tokens of the cosine of every pair of boundaries: (L+1, n, d) unit states -> (L+1, L+1) float64, CPU.

    The sum over tokens of all dot products is one product of matrices whose inner dimension runs over tokens and width.
    """
    size, num_tokens, width = units.shape
    if num_tokens == 0:
        return torch.zeros(size, size, dtype=torch.float64)
    whole = num_tokens - num_tokens % _BLOCK_TOKENS
    total = torch.zeros(size, size, dtype=torch.float64)
    for part, block in ((units[:, :whole], _BLOCK_TOKENS), (units[:, whole:], num_tokens - whole)):
        if part.shape[1]:
            flat = part.reshape(size, -1, block * width).transpose(0, 1)  # (blocks, L+1, block * d)
            total += torch.bmm(flat, flat.transpose(1, 2)).double().sum(dim=0).cpu()
    return total


def check_finite(norms: Tensor) -> None:
    """Raise NumericsError, naming the layer, unless all norms (L+1, n) of the states at the boundaries are finite."""
    good = torch.isfinite(norms).all(dim=1)
    if not bool(good.all()):
        boundary = int((~good).nonzero()[0])
        where = "the embedding" if boundary == 0 else f"layer {boundary - 1}"
        raise NumericsError(
            f"the output of {where} is not finite (NaN or infinity) on the calibration text; "
            "are the weights damaged, or too large for this dtype? Try --dtype bfloat16 or float32"
        )
