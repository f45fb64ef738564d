import pytest
import torch
import torch.nn.functional as F
from plans import tiny_windows
from tiny import tiny_model

from llm_streamline.arch import find_arch, get_layers, silence
from llm_streamline.errors import ArchitectureError, NumericsError
from llm_streamline.measure import gradients
from llm_streamline.measure.gradients import layer_weights, magnitudes, taylor


def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits[0].double()
    return F.cross_entropy(logits[:-1], ids[0, 1:])


def by_autograd(model, ids):
    """Sum of |w * dL/dw| over each layer's weights, with every gradient kept."""
    model.requires_grad_(True)
    model.zero_grad()
    loss_of(model, ids).backward()
    sums = []
    for layer in get_layers(model):
        named = [(n, p) for n, p in layer.named_parameters() if not n.endswith("bias") and p.grad is not None]
        sums.append(sum(float((p * p.grad).detach().double().abs().sum()) for _, p in named))
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom", "mixtral"])
def test_equals_autograd_window_by_window(name):
    model, windows = tiny_model(name), tiny_windows(3)
    found = taylor(model, windows)
    truth = torch.stack([by_autograd(model, ids[None].long()) for ids in windows.input_ids])
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


def test_equals_finite_differences():
    """No derivative is taken: each weight is moved a little, up and down. GPT-2 computes in float64 when asked to."""
    model = tiny_model("gpt2", num_hidden_layers=2, hidden_size=8, num_attention_heads=2).double()
    ids, step, total = tiny_windows(1, 8).input_ids.long(), 1e-6, 0.0
    with torch.no_grad():
        for weight in layer_weights(get_layers(model)[1]):
            flat = weight.view(-1)
            for i in range(len(flat)):
                kept = float(flat[i])
                flat[i] = kept + step
                above = float(loss_of(model, ids))
                flat[i] = kept - step
                below = float(loss_of(model, ids))
                flat[i] = kept
                total += abs(kept * (above - below) / (2 * step))
    assert float(taylor(model, tiny_windows(1, 8))[0, 1]) == pytest.approx(total, rel=1e-4)


def test_a_silent_layer_is_worth_nothing_to_first_order():
    model = tiny_model()
    silence(model.model.layers[3], find_arch(model))
    scores = taylor(model, tiny_windows(2))
    assert scores[:, 3].abs().max() == 0
    assert scores[:, [0, 1, 2, 4, 5, 6, 7]].min() > 0


def test_only_one_gradient_exists_at_a_time_and_the_model_is_left_as_it_was(monkeypatch):
    model = tiny_model()
    first = model.model.layers[0].mlp.up_proj.weight
    first.requires_grad_(True)
    first.grad = kept = torch.ones_like(first)
    there = []
    plain = gradients._power_sum

    def watched(values, power):
        there.append(sum(p.grad is not None for p in model.parameters()))
        return plain(values, power)

    monkeypatch.setattr(gradients, "_power_sum", watched)
    taylor(model, tiny_windows(2))
    assert len(there) == 2 * 8 * 9
    assert max(there) == 1
    assert first.grad is kept
    assert [p for p in model.parameters() if p.requires_grad] == [first]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_half_precision_products_do_not_vanish():
    layer = torch.nn.Linear(4, 4, bias=False).half()
    layer.weight.data.fill_(2**-12)
    with gradients._reduced_gradients([layer]) as sums:
        (layer.weight * 2**-14).sum().backward()
    assert float(sums[0]) == 16 * 2**-26  # each product is a quarter of the smallest number float16 has


def test_a_half_precision_model_is_scored_like_a_whole_one():
    model = tiny_model()
    model.lm_head.weight.data.mul_(1e-4)
    whole = taylor(model, tiny_windows(2))
    half = taylor(model.bfloat16(), tiny_windows(2))
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0)


def test_magnitudes_count_every_weight_once_and_no_bias():
    model = tiny_model("llama_tied_bias")
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for parameter in layer.parameters():
                parameter.fill_(-0.5 * index)
    layer = model.model.layers[0]
    count = sum(p.numel() for n, p in layer.named_parameters() if n.endswith("weight"))
    assert any(n.endswith("bias") for n, _ in layer.named_parameters())
    index = torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(magnitudes(model, 1), 0.5 * index * count)
    torch.testing.assert_close(magnitudes(model, 2), 0.25 * index**2 * count)


def test_a_gradient_that_is_not_finite_names_its_layer():
    model = tiny_model()
    model.model.layers[5].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="the gradient of layer"):
        taylor(model, tiny_windows(1))


def test_weights_that_are_not_in_memory_are_refused():
    model = tiny_model()
    model.model.layers[2].to("meta")
    with pytest.raises(ArchitectureError, match="offloaded"):
        taylor(model, tiny_windows(1))
    with pytest.raises(ArchitectureError, match="offloaded"):
        magnitudes(model, 1)
