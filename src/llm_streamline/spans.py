"""From scores to spans: plain numbers, no torch.

A span is a half-open run of layers [start, stop), both 0-based. Scores are given as an (L+1) x (L+1) table in which
cell [start][stop] is the similarity between the state entering layer `start` and the state leaving layer `stop - 1`.
"""

from collections.abc import Sequence
from itertools import zip_longest

Span = tuple[int, int]


def spans_of_length(length: int, num_layers: int) -> list[Span]:
    """All spans of `length` layers in a model of `num_layers`, shallow first."""
    return [(start, start + length) for start in range(num_layers - length + 1)]


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` lowest scores in ascending order of index; of equal scores the deeper layer is taken."""
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
    return sorted(ranked[:count])


def ranked_spans(table: Sequence[Sequence[float]], length: int) -> list[Span]:
    """Spans of `length` layers, most similar first; of equal similarities the shallower one is first.

    LLM-Streamline (arXiv:2403.19135), section "layer pruning": the span with the highest mean cosine is removed.
    """
    spans = spans_of_length(length, len(table) - 1)
    return sorted(spans, key=lambda span: (-table[span[0]][span[1]], span[0]))


def interleave(first: Sequence[Span], second: Sequence[Span], count: int) -> list[Span]:
    """Up to `count` different spans taken in turns from two rankings, best first."""
    chosen: dict[Span, None] = {}
    for pair in zip_longest(first, second):
        for span in pair:
            if span is not None and len(chosen) < count:
                chosen.setdefault(span)
    return list(chosen)


def runs(layers: Sequence[int]) -> list[Span]:
    """Join ascending layer indices into spans: [3, 12, 13] -> [(3, 4), (12, 14)]."""
    spans: list[Span] = []
    for layer in layers:
        if spans and spans[-1][1] == layer:
            spans[-1] = (spans[-1][0], layer + 1)
        else:
            spans.append((layer, layer + 1))
    return spans
