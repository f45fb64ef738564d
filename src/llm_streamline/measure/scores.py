"""From statistics to numbers per layer or span: short pure functions. Shapes: L layers, G groups of windows."""

import torch
from torch import Tensor

from llm_streamline.errors import NoDataError


def mean_similarity(cosine_sum: Tensor, num_tokens: int) -> Tensor:
    """Mean cosine between the states at every pair of boundaries.

    LLM-Streamline (arXiv:2403.19135), section "layer pruning": cell [s, e] is the similarity of the span [s, e).

    Args:
        cosine_sum: (L+1, L+1) float64, cosines summed over tokens.
        num_tokens: tokens summed over; padding not counted.

    Returns:
        (L+1, L+1) float64 in [-1, 1], unit diagonal. High means that the span changes little: prune high first.

    Raises:
        NoDataError: if no token was seen.
    """
    if num_tokens == 0:
        raise NoDataError("no calibration token was seen, so there is no similarity to speak of")
    similarity = (cosine_sum / num_tokens).clamp(-1.0, 1.0)
    return (similarity + similarity.T) / 2


def block_influence(similarity: Tensor) -> Tensor:
    """One minus the mean cosine between a layer's input and its output.

    ShortGPT (arXiv:2403.03853), equation 1.

    Args:
        similarity: (L+1, L+1) mean cosine between boundaries.

    Returns:
        (L,) float64 in [0, 2]. Low means the layer changes little: prune low first.
    """
    return 1 - similarity.diagonal(offset=1)


def bootstrap_mean_difference(
    first: Tensor, second: Tensor, weights: Tensor, seed: int, num_samples: int = 2000
) -> tuple[float, float, float]:
    """Weighted mean of `first - second` over groups, with a percentile bootstrap interval over the groups.

    Args:
        first: (G,) a quantity's mean in each group.
        second: (G,) the other's, for the same groups: the comparison is paired.
        weights: (G,) tokens in each group; empty groups are left out.
        seed: of the resampling.
        num_samples: bootstrap samples.

    Returns:
        The difference and the 2.5th and 97.5th percentile of its bootstrap distribution.
    """
    keep = weights > 0
    difference, weights = (first - second)[keep].double(), weights[keep].double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(difference), (num_samples, len(difference)), generator=generator)
    means = (difference[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float((difference * weights).sum() / weights.sum()), low, high


def bootstrap_ranks(values: Tensor, seed: int, num_samples: int = 1000) -> list[tuple[int, int]]:
    """Ranks that items might have had with other windows: bootstrap over windows of the rank of each item's mean.

    Args:
        values: (W, n) a quantity of n items in each window, lowest mean first.
        seed: of the resampling.
        num_samples: bootstrap samples.

    Returns:
        For each item the 2.5th and 97.5th percentile of its rank, 1 for the lowest.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(num_samples, len(values), dtype=torch.float64)
    drawn = torch.randint(len(values), (num_samples, len(values)), generator=generator)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    ranks = (counts @ values.double()).argsort(dim=1).argsort(dim=1).double() + 1  # (samples, n)
    low = ranks.quantile(0.025, dim=0, interpolation="lower")
    high = ranks.quantile(0.975, dim=0, interpolation="higher")
    return [(int(a), int(b)) for a, b in zip(low, high, strict=True)]


def massive_activation_layers(norm_first: Tensor, norm_rest: Tensor, factor: float = 10.0) -> list[int]:
    """Layers that lengthen the first token's state by `factor` or more while the other tokens' stay within it.

    Args:
        norm_first: (L+1,) mean norm of the first token's state at each boundary.
        norm_rest: (L+1,) mean norm of the other tokens'.
        factor: growth within one layer that counts as massive.
    """
    growth_first = norm_first[1:] / norm_first[:-1].clamp_min(1e-12)
    growth_rest = norm_rest[1:] / norm_rest[:-1].clamp_min(1e-12)
    return [i for i in range(len(growth_first)) if growth_first[i] >= factor > growth_rest[i]]
