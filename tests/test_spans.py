from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llm_streamline.spans import interleave, lowest, ranked_spans, runs, spans_of_length


def test_all_spans_of_a_length():
    assert spans_of_length(2, 4) == [(0, 2), (1, 3), (2, 4)]
    assert spans_of_length(4, 4) == [(0, 4)]


def test_lowest_returns_ascending_indices_and_prefers_deep_layers_on_ties():
    assert lowest([3.0, 1.0, 2.0, 1.0], 2) == [1, 3]
    assert lowest([1.0, 1.0, 1.0], 2) == [1, 2]


def test_the_most_similar_span_comes_first_and_the_shallow_one_on_ties():
    table = [[0.0] * 5 for _ in range(5)]
    table[0][2], table[1][3], table[2][4] = 0.5, 0.9, 0.5
    assert ranked_spans(table, 2) == [(1, 3), (0, 2), (2, 4)]


def test_only_spans_of_the_asked_length_are_ranked():
    table = [[1.0] * 4 for _ in range(4)]
    assert ranked_spans(table, 3) == [(0, 3)]


def test_two_rankings_are_taken_in_turns_without_repetition():
    first, second = [(0, 1), (1, 2), (2, 3)], [(1, 2), (0, 1), (2, 3)]
    assert interleave(first, second, 2) == [(0, 1), (1, 2)]
    assert interleave(first, second, 9) == [(0, 1), (1, 2), (2, 3)]


def test_adjacent_layers_join():
    assert runs([3, 12, 13]) == [(3, 4), (12, 14)]
    assert runs([]) == []


@given(st.sets(st.integers(0, 40)))
def test_runs_cover_exactly_the_layers_and_never_touch(layers):
    spans = runs(sorted(layers))
    assert [i for start, stop in spans for i in range(start, stop)] == sorted(layers)
    assert all(a[1] < b[0] for a, b in pairwise(spans))
