"""The similarity of every span: streamed, batched and by brute force with forward hooks in float64 it is the same."""

import weakref

import pytest
import torch
from plans import tiny_windows
from tiny import NUM_LAYERS, SEQ_LEN, tiny_model, tiny_tokens

from llm_streamline.arch import get_layers
from llm_streamline.data.windows import Windows
from llm_streamline.errors import NoDataError, NumericsError
from llm_streamline.measure.partial import run_tapped, state_of
from llm_streamline.measure.scores import mean_similarity
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe

FAMILIES = [
    "llama",
    "qwen2",
    "gemma3",
    "opt",
    "opt_post_norm",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon",
    "gptj",
    "gpt_neo",
]


def hooked_states(model, ids, mask=None):
    """(L+1, B, T, d) float64 states, by hooks of the test's own: the truth the streamed pass is held against."""
    kept = []
    layers = get_layers(model)
    handles = [
        layers[0].register_forward_pre_hook(
            lambda _m, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    handles += [
        layer.register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([state.double() for state in kept])


def brute_force(states, mask=None):
    """(L+1, L+1) mean cosine over real tokens, one pair of boundaries at a time."""
    num = len(states)
    table = torch.zeros(num, num, dtype=torch.float64)
    for i in range(num):
        for j in range(num):
            cosines = torch.nn.functional.cosine_similarity(states[i], states[j], dim=-1)
            table[i, j] = (cosines if mask is None else cosines[mask.bool()]).mean()
    return table


def streamed(model, windows, batch_tokens):
    sums = CosineStats(len(get_layers(model)))
    observe(model, windows, sums, batch_tokens, "test")
    return sums


def similarity(sums):
    return mean_similarity(sums.cosine_sum_first + sums.cosine_sum_rest, sums.num_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_batched_and_brute_force_agree(name):
    model, windows = tiny_model(name), tiny_windows(7, SEQ_LEN)
    truth = brute_force(hooked_states(model, windows.input_ids.long()))
    for batch_tokens in (1, 3 * SEQ_LEN, 1000 * SEQ_LEN):
        sums = streamed(model, windows, batch_tokens)
        torch.testing.assert_close(similarity(sums), truth, rtol=0, atol=1e-6)
        assert (sums.count_first, sums.count_rest) == (7, 7 * (SEQ_LEN - 1))


def test_first_tokens_and_the_others_are_kept_apart():
    model, windows = tiny_model(), tiny_windows(5)
    states = hooked_states(model, windows.input_ids.long())
    sums = streamed(model, windows, 32)
    first = mean_similarity(sums.cosine_sum_first, sums.count_first)
    rest = mean_similarity(sums.cosine_sum_rest, sums.count_rest)
    torch.testing.assert_close(first, brute_force(states[:, :, :1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(rest, brute_force(states[:, :, 1:]), rtol=0, atol=1e-6)
    norms = states.norm(dim=-1)
    torch.testing.assert_close(sums.norm_sum_first, norms[:, :, 0].sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.norm_sum_rest, norms[:, :, 1:].sum((1, 2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.norm_max, norms.amax((1, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_padding_on_either_side_counts_nothing(name, side):
    model, lengths = tiny_model(name), (SEQ_LEN, 9, 1)
    ids = tiny_tokens(3)
    place = torch.arange(SEQ_LEN)
    real = [place < n if side == "right" else place >= SEQ_LEN - n for n in lengths]
    mask = torch.stack(real).long()
    ids = ids.where(mask.bool(), torch.zeros_like(ids))
    inputs = {"input_ids": ids, "attention_mask": mask}
    sums = CosineStats(NUM_LAYERS)
    with torch.no_grad():
        states, _ = run_tapped(model, inputs, sums.boundaries, stop=NUM_LAYERS)
    sums.update([states[b] for b in sums.boundaries], mask, 0)
    torch.testing.assert_close(similarity(sums), brute_force(hooked_states(model, ids, mask), mask), rtol=0, atol=1e-6)
    assert (sums.count_first, sums.count_rest) == (3, sum(lengths) - 3)
    # whatever stands at the padding, even what is no number, changes nothing
    for state in states.values():
        state[~mask.bool()] = float("nan")
    poisoned = CosineStats(NUM_LAYERS)
    poisoned.update([states[b] for b in sums.boundaries], mask, 0)
    assert all(torch.equal(a, b) for a, b in zip(sums.tensors().values(), poisoned.tensors().values(), strict=True))


def test_the_last_boundary_lies_before_the_final_norm_and_the_first_after_the_embedding():
    model, ids = tiny_model(), tiny_tokens()
    with torch.no_grad():
        states, _ = run_tapped(model, {"input_ids": ids}, range(NUM_LAYERS + 1), stop=NUM_LAYERS)
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    for boundary in range(NUM_LAYERS):
        assert torch.equal(states[boundary], hidden[boundary])
    assert not torch.allclose(states[NUM_LAYERS], hidden[-1], atol=1e-2)
    torch.testing.assert_close(model.model.norm(states[NUM_LAYERS]), hidden[-1])


def test_the_order_of_windows_does_not_matter():
    model, windows = tiny_model(), tiny_windows(6)
    turned = Windows(input_ids=windows.input_ids.flip(0))
    one, other = similarity(streamed(model, windows, 48)), similarity(streamed(model, turned, 32))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def random_states(num_layers=3, batch=4, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, 16, generator=generator) for _ in range(num_layers + 1)]


def sums_of(states, mask=None, first_window=0):
    sums = CosineStats(len(states) - 1)
    sums.update(states, mask, first_window)
    return sums


def test_scaling_tokens_changes_no_similarity():
    states = random_states()
    generator = torch.Generator().manual_seed(1)
    scaled = [state * torch.rand(4, 20, 1, generator=generator).mul(1e4).add(1e-4) for state in states]
    torch.testing.assert_close(similarity(sums_of(states)), similarity(sums_of(scaled)), rtol=0, atol=1e-6)


def test_an_empty_span_has_similarity_one():
    torch.testing.assert_close(similarity(sums_of(random_states())).diagonal(), torch.ones(4, dtype=torch.float64))


def test_parallel_and_opposite_states_are_plus_and_minus_one():
    state = random_states()[0]
    table = similarity(sums_of([state, 3 * state, -state]))
    torch.testing.assert_close(table[0], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


def test_a_long_window_is_summed_without_loss_of_precision():
    # 4096 equal cosines: a running bfloat16 or float32 sum of ones would stall or drift (pitfalls D)
    state = torch.full((1, 4096, 8), 0.1)
    assert similarity(sums_of([state, state]))[0, 1].item() == pytest.approx(1.0, abs=1e-7)


def test_low_precision_states_are_measured_in_float32():
    states = random_states(length=600)
    low = [state.bfloat16() for state in states]
    truth = brute_force(torch.stack([state.double() for state in low]))
    torch.testing.assert_close(similarity(sums_of(low)), truth, rtol=0, atol=1e-6)


def test_merging_two_passes_equals_one():
    states = random_states(batch=6)
    whole = sums_of(states)
    part = sums_of([state[:2] for state in states])
    part.merge(sums_of([state[2:] for state in states], first_window=2))
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(getattr(part, name), tensor, rtol=1e-12, atol=1e-12)
    assert (part.count_first, part.count_rest) == (whole.count_first, whole.count_rest)


def test_groups_add_up_to_the_whole():
    sums = sums_of(random_states(batch=70))
    torch.testing.assert_close(sums.group_cosine_sum.sum(0), sums.cosine_sum_first + sums.cosine_sum_rest)
    assert sums.group_count.sum() == sums.num_tokens
    assert sums.group_count.max() == 40  # windows 0 and 64 share a group


def test_a_state_of_length_zero_has_no_direction():
    states = random_states(1)
    states[1][:] = 0
    assert similarity(sums_of(states))[0, 1] == 0


def test_nothing_seen_is_an_error():
    with pytest.raises(NoDataError, match="no calibration token"):
        CosineStats(3).require_data()
    sums = sums_of(random_states(), mask=torch.zeros(4, 20))
    with pytest.raises(NoDataError):
        sums.require_data()
    with pytest.raises(NoDataError):
        mean_similarity(sums.cosine_sum_rest, sums.num_tokens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("layer", "named"), [(None, "the embedding"), (0, "layer 0"), (5, "layer 5"), (7, "layer 7")])
def test_a_layer_whose_output_is_not_finite_is_named(bad, layer, named):
    model = tiny_model()
    if layer is None:
        model.model.embed_tokens.weight[7] = bad
    else:
        model.model.layers[layer].mlp.down_proj.weight[0, 0] = bad
    windows = tiny_windows()
    windows.input_ids[0, 3] = 7
    with pytest.raises(NumericsError, match=f"the output of {named} is not finite"):
        streamed(model, windows, 64)


def test_the_head_never_runs():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    model.model.norm.register_forward_hook(lambda *_: pytest.fail("the final norm ran"))
    streamed(model, tiny_windows(), 64)


def test_memory_does_not_grow_with_tokens():
    """No state of an earlier batch is alive when a later one is seen: bookkeeping of tensors, not of time."""
    model, alive, most = tiny_model(), [], []

    def count(_module, _args, output):
        alive[:] = [ref for ref in alive if ref() is not None]
        most.append(len(alive))
        alive.append(weakref.ref(state_of(output)))

    for layer in get_layers(model):
        layer.register_forward_hook(count)
    streamed(model, tiny_windows(10), 16)
    assert len(most) == 10 * NUM_LAYERS
    assert max(most) <= 2 * NUM_LAYERS


def test_hooks_are_gone_after_the_pass():
    model = tiny_model()
    streamed(model, tiny_windows(), 64)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
