import math

import pytest
import torch
from plans import tiny_windows
from tiny import tiny_model

from llm_streamline.errors import NoDataError, NumericsError
from llm_streamline.measure.angular import AngularStats, angular_distances
from llm_streamline.measure.stream import observe


def test_same_orthogonal_and_opposite_directions():
    states = torch.tensor([[1.0, 0.0], [7.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = angular_distances(states)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(found, found.T)


def test_a_tiny_angle_is_not_lost_in_the_cosine():
    angle = 1e-9  # its cosine is one in float64
    states = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert float(angular_distances(states)[0, 1]) == pytest.approx(angle / math.pi, rel=1e-6)


def test_a_state_without_direction_counts_as_orthogonal():
    found = angular_distances(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert float(found[0, 1]) == pytest.approx(0.5)


def brute_force(model, windows):
    """From transformers' own hidden states, which lack only the last layer's output before the norm."""
    last = []
    model.model.layers[-1].register_forward_hook(lambda _m, _a, out: last.append(out[0] if type(out) is tuple else out))
    states = model(windows.input_ids.long(), output_hidden_states=True, use_cache=False).hidden_states
    states = torch.stack([*states[:-1], last[0]])[:, :, -1].double()  # (L+1, W, d)
    cosine = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1).clamp(-1, 1)
    return (torch.arccos(cosine) / math.pi).mean(-1)


@torch.no_grad()
def test_equals_brute_force_over_the_last_token_of_every_window():
    model, windows = tiny_model(), tiny_windows(5)
    sums = AngularStats(8)
    observe(model, windows, sums, 32, "test")
    torch.testing.assert_close(sums.distance, brute_force(model, windows), rtol=1e-5, atol=1e-5)
    assert sums.group_count.sum() == 5


@torch.no_grad()
def test_batches_do_not_change_the_sums():
    model, windows = tiny_model(), tiny_windows(5)
    one, other = AngularStats(8), AngularStats(8)
    observe(model, windows, one, 1, "test")
    observe(model, windows, other, 10**6, "test")
    torch.testing.assert_close(one.group_sum, other.group_sum, rtol=1e-4, atol=1e-5)


def test_padding_on_either_side_is_skipped():
    states = [torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    plain, left, right = AngularStats(2), AngularStats(2), AngularStats(2)
    plain.update(states, None, 0)
    pad = torch.full((2, 3, 4), 99.0)
    mask = torch.ones(2, 6, dtype=torch.long)
    nothing = torch.zeros(2, 3, dtype=torch.long)
    left.update([torch.cat([pad, s], 1) for s in states], torch.cat([nothing, mask], 1), 0)
    right.update([torch.cat([s, pad], 1) for s in states], torch.cat([mask, nothing], 1), 0)
    assert torch.equal(plain.group_sum, left.group_sum)
    assert torch.equal(plain.group_sum, right.group_sum)


def test_no_window_and_broken_states_are_told():
    with pytest.raises(NoDataError):
        _ = AngularStats(2).distance
    states = [torch.ones(1, 2, 4), torch.full((1, 2, 4), float("nan")), torch.ones(1, 2, 4)]
    with pytest.raises(NumericsError, match="layer 0"):
        AngularStats(2).update(states, None, 0)
