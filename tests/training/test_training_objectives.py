import pytest
import torch
import torch.nn.functional as F

from llm_streamline.measure import losses
from llm_streamline.training.objectives import divergence, hidden_state_error, next_token_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 100, 1 << 21], autouse=True)
def _piece_size(request, monkeypatch):
    """The losses are computed a few positions at a time: how many must not matter."""
    monkeypatch.setattr(losses, "_PIECE_ELEMENTS", request.param)


def naive_kl(student, teacher, top_k=0, temperature=1.0):
    p = F.softmax(teacher.double() / temperature, -1)
    q = F.softmax(student.double() / temperature, -1)
    if top_k:
        index = p.topk(top_k, -1).indices
        p, q = p.gather(-1, index), q.gather(-1, index)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    return (p * (p / q).log()).sum(-1).mean() * temperature**2


@pytest.mark.parametrize("top_k", [0, 1, 5, 19])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_kl_of_teacher_and_student(top_k, temperature):
    student, teacher = random(2, 9, 20).requires_grad_(True), random(2, 9, 20, seed=1)
    truth = naive_kl(student, teacher, top_k, temperature)
    ours = divergence(student, teacher, top_k, temperature)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(truth, student)
    torch.testing.assert_close(torch.autograd.grad(ours, student)[0], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("top_k", [20, 500])
def test_more_than_all_tokens_are_all_tokens(top_k):
    student, teacher = random(1, 5, 20), random(1, 5, 20, seed=1)
    assert divergence(student, teacher, top_k) == divergence(student, teacher, 0)


@pytest.mark.parametrize("top_k", [0, 3])
def test_equal_predictions_do_not_diverge(top_k):
    logits = random(2, 5, 20)
    assert float(divergence(logits, logits.clone(), top_k)) == pytest.approx(0, abs=1e-7)
    assert float(divergence(logits, logits + 100, top_k)) == pytest.approx(0, abs=1e-5)


def test_the_direction_is_from_the_teacher():
    sure, unsure = torch.tensor([[[8.0, 0.0, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])
    assert float(divergence(unsure, sure)) == pytest.approx(float(naive_kl(unsure, sure)))
    assert float(divergence(unsure, sure)) != pytest.approx(float(divergence(sure, unsure)), rel=0.05)


def test_next_token_loss_is_cross_entropy_of_the_shifted_ids():
    logits = random(2, 9, 20).requires_grad_(True)
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(1))
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    ours = next_token_loss(logits, ids)
    torch.testing.assert_close(ours, truth)
    (wanted,) = torch.autograd.grad(truth, logits)
    (found,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(found, wanted)
    assert not found[:, -1].any()  # the last position predicts nothing that is known


def test_uniform_error_is_the_mean_square():
    predicted, target = random(2, 5, 8), random(2, 5, 8, seed=1)
    torch.testing.assert_close(hidden_state_error(predicted, target, "uniform"), F.mse_loss(predicted, target))


def test_skip_first_leaves_the_massive_token_out():
    predicted, target = random(2, 5, 8), random(2, 5, 8, seed=1)
    wanted = F.mse_loss(predicted[:, 1:], target[:, 1:])
    target[:, 0] = 1e6
    torch.testing.assert_close(hidden_state_error(predicted, target, "skip_first"), wanted)


def test_relative_error_weighs_every_token_alike():
    predicted, target = random(2, 5, 8), random(2, 5, 8, seed=1)
    wanted = ((predicted - target).square().mean(-1) / target.square().mean(-1)).mean()
    found = hidden_state_error(predicted, target, "relative")
    torch.testing.assert_close(found, wanted)
    scale = torch.tensor([1000.0, 1, 1, 0.01, 1])[None, :, None]
    torch.testing.assert_close(hidden_state_error(predicted * scale, target * scale, "relative"), wanted)


def test_errors_of_half_precision_states_are_taken_in_float32():
    predicted, target = random(1, 50, 8).bfloat16(), random(1, 50, 8, seed=1).bfloat16()
    found = hidden_state_error(predicted, target, "uniform")
    torch.testing.assert_close(found, F.mse_loss(predicted.float(), target.float()), rtol=1e-6, atol=0)
