"""From scores to spans: plain numbers, no torch.

A span is a half-open run of layers [start, stop), both 0-based. Scores are given as an (L+1) x (L+1) table in which
cell [start][stop] is the similarity between the state entering layer `start` and the state leaving layer `stop - 1`.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar

Span = tuple[int, int]
Item = TypeVar("Item")


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


def interleave(first: Sequence[Item], second: Sequence[Item], count: int) -> list[Item]:
    """Up to `count` different items taken in turns from two rankings, best first."""
    return take_turns([first, second], count)


def take_turns(rankings: Sequence[Sequence[Item]], count: int) -> list[Item]:
    """Up to `count` different items: the best of each ranking in turn, then the second best of each, and so on."""
    chosen: dict[Item, None] = {}
    for row in zip_longest(*rankings):
        for item in row:
            if item is not None and len(chosen) < count:
                chosen.setdefault(item)
    return list(chosen)


def cheapest_sets(
    cost: Sequence[Sequence[float]],
    net: int,
    put_back: int,
    max_spans: int,
    min_length: int,
    count: int,
    lowest_start: int = 0,
) -> dict[int, list[tuple[float, tuple[Span, ...]]]]:
    """Sets of spans that do not overlap and together make a model `net` layers shorter, at the least sum of costs.

    Dynamic programming over the layers, keeping the `count` best ways to every (spans so far, layers saved so far).
    Where nothing is put back, two spans that touch would be one span at another price: a layer must stay between them.

    Args:
        cost: (L+1) x (L+1) table, cell [start][stop] what span [start, stop) costs; infinity forbids it.
        net: layers fewer in the result.
        put_back: layers that come back in place of each span.
        max_spans: spans in a set at most.
        min_length: layers in a span at least; more than `put_back`.
        count: sets wanted for each number of spans.
        lowest_start: first layer at which a span may start.

    Returns:
        Number of spans -> up to `count` (sum of costs, ascending spans), cheapest first; absent where there is no set.
    """
    num_layers = len(cost) - 1
    Ways = dict[tuple[int, int], list[tuple[float, tuple[Span, ...]]]]  # (spans, layers saved) -> ways, cheapest first
    reached: list[Ways] = []  # by boundary: every way to deal with the layers below it
    for stop in range(num_layers + 1):
        ways: Ways = {(0, 0): [(0.0, ())]} if stop == 0 else {key: list(found) for key, found in reached[-1].items()}
        for start in range(lowest_start, stop - min_length + 1):
            price, saved = cost[start][stop], stop - start - put_back
            if price == float("inf"):
                continue
            below = reached[start] if put_back or start == 0 else reached[start - 1]
            for (spans, before), found in below.items():
                if spans < max_spans and before + saved <= net:
                    longer = ways.setdefault((spans + 1, before + saved), [])
                    longer += [(total + price, (*taken, (start, stop))) for total, taken in found]
        reached.append({key: sorted(found)[:count] for key, found in ways.items() if found})
    return {spans: found for (spans, saved), found in sorted(reached[-1].items()) if saved == net and spans > 0}


def runs(layers: Sequence[int]) -> list[Span]:
    """Join ascending layer indices into spans: [3, 12, 13] -> [(3, 4), (12, 14)]."""
    spans: list[Span] = []
    for layer in layers:
        if spans and spans[-1][1] == layer:
            spans[-1] = (spans[-1][0], layer + 1)
        else:
            spans.append((layer, layer + 1))
    return spans
