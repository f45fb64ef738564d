import pytest
import torch
import torch.nn.functional as F

from llm_streamline.measure import losses
from llm_streamline.measure.losses import token_losses
from llm_streamline.measure.scores import (
    block_influence,
    bootstrap_mean_difference,
    massive_activation_layers,
    mean_similarity,
)


def test_block_influence_is_one_minus_the_similarity_across_a_layer():
    table = torch.eye(4, dtype=torch.float64)
    table[0, 1], table[1, 2], table[2, 3] = 0.9, 0.5, -0.25
    assert block_influence(table).tolist() == pytest.approx([0.1, 0.5, 1.25])


def test_the_mean_is_symmetric_and_never_beyond_one():
    sums = torch.tensor([[2.0, 2.0 + 1e-12], [1.0, 2.0]], dtype=torch.float64)
    mean = mean_similarity(sums, 2)
    assert torch.equal(mean, mean.T)
    assert mean.max() <= 1


def test_a_constant_difference_has_no_interval():
    first = torch.arange(10.0)
    assert bootstrap_mean_difference(first + 0.5, first, torch.ones(10), seed=0) == (0.5, 0.5, 0.5)


def test_the_interval_is_that_of_the_mean():
    difference = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, low, high = bootstrap_mean_difference(difference, torch.zeros(400), torch.ones(400), seed=1)
    half = 1.96 * float(difference.std()) / 20
    assert mean == pytest.approx(float(difference.mean()))
    assert low == pytest.approx(mean - half, abs=0.15 * half)
    assert high == pytest.approx(mean + half, abs=0.15 * half)


def test_groups_weigh_by_their_tokens_and_empty_ones_are_left_out():
    first = torch.tensor([1.0, 5.0, float("nan")])
    mean, low, high = bootstrap_mean_difference(first, torch.zeros(3), torch.tensor([3.0, 1.0, 0.0]), seed=0)
    assert mean == 2.0
    assert (low, high) == (1.0, 5.0)


def test_the_interval_weighs_groups_by_their_tokens_too():
    weights = torch.arange(1.0, 65.0, dtype=torch.float64)
    mean, low, high = bootstrap_mean_difference(weights, torch.zeros(64), weights, seed=0)  # large groups differ more
    assert mean == pytest.approx(43)  # sum of squares over sum
    half = 1.96 * float((weights**2 * (weights - 43) ** 2).sum().sqrt() / weights.sum())  # a ratio's standard error
    assert (low, high) == pytest.approx((43 - half, 43 + half), abs=0.2 * half)


def test_the_interval_depends_on_the_seed_alone():
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    one = bootstrap_mean_difference(values, torch.zeros(9), torch.ones(9), seed=3)
    torch.randn(5)
    assert one == bootstrap_mean_difference(values, torch.zeros(9), torch.ones(9), seed=3)
    assert one != bootstrap_mean_difference(values, torch.zeros(9), torch.ones(9), seed=4)


def test_the_layer_that_lengthens_the_first_token_alone_is_found():
    first = torch.tensor([1.0, 1.2, 300.0, 310.0, 320.0, 2.0])
    rest = torch.tensor([1.0, 1.2, 1.5, 2.0, 3.0, 3.0])
    assert massive_activation_layers(first, rest) == [1]


def test_a_layer_that_lengthens_every_token_makes_no_massive_activation():
    assert massive_activation_layers(torch.tensor([1.0, 50.0]), torch.tensor([1.0, 50.0])) == []


@pytest.fixture(params=[1, 64, 1 << 21])
def _piece_size(request, monkeypatch):
    monkeypatch.setattr(losses, "_PIECE_ELEMENTS", request.param)


@pytest.mark.usefixtures("_piece_size")
@pytest.mark.parametrize("tokens", [2, 7, 40])
def test_token_losses_equal_the_plain_formula(tokens):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tokens, 11, generator=generator)
    ids = torch.randint(11, (2, tokens), generator=generator)
    truth = -F.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_losses(logits, ids).double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_piece_size")
def test_a_mean_loss_has_the_value_and_the_gradient_of_the_whole():
    logits = torch.randn(2, 30, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(1))
    truth = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    ours = losses.mean_loss(losses.cross_entropy, logits, targets)
    torch.testing.assert_close(ours, truth)
    (wanted,) = torch.autograd.grad(3 * truth, logits)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, logits)[0], wanted)


def test_bfloat16_logits_are_judged_in_float32():
    logits = (torch.randn(1, 40, 300, generator=torch.Generator().manual_seed(0)) * 20).bfloat16()
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(1))
    found = token_losses(logits, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_losses(logits.float(), ids), rtol=0, atol=0)
