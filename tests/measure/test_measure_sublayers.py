import pytest
import torch
import torch.nn.functional as F
from plans import tiny_windows
from tiny import TINY_ROWS, tiny_model

from llm_streamline.arch import find_arch, get_layers, silence_attention, silence_mlp
from llm_streamline.errors import ArchitectureError, NoDataError
from llm_streamline.measure.stream import observe
from llm_streamline.measure.sublayers import SublayerStats, _turn


def measured(model, windows, batch_tokens=48):
    stats = SublayerStats(model)
    with stats.watching():
        observe(model, windows, stats, batch_tokens, "test")
    return stats.change


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_ROWS)
def test_silent_sublayers_change_nothing_and_all_others_something(name):
    model = tiny_model(name)
    arch, layers = find_arch(model), get_layers(model)
    try:
        silence_attention(layers[2], arch)
        silence_mlp(layers[5], arch)
        change = measured(model, tiny_windows(2)).mean(0)
    except ArchitectureError as problem:
        pytest.skip(str(problem))
    quiet = change < 1e-6
    assert quiet.nonzero().tolist() == [[2, 0], [5, 1]]


@torch.no_grad()
def test_equals_the_sums_written_out_by_hand():
    model, windows = tiny_model(), tiny_windows(3)
    truth = torch.zeros(3, 8, 2, dtype=torch.float64)
    inputs, attention, outputs = {}, {}, {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _m, a, i=i: inputs.update({i: a[0]}))
        layer.self_attn.register_forward_hook(lambda _m, _a, out, i=i: attention.update({i: out[0]}))
        layer.register_forward_hook(
            lambda _m, _a, out, i=i: outputs.update({i: out[0] if isinstance(out, tuple) else out})
        )
    model(windows.input_ids.long(), use_cache=False)
    for i in range(8):
        middle = inputs[i] + attention[i]
        truth[:, i, 0] = 1 - F.cosine_similarity(inputs[i].double(), middle.double(), dim=-1).mean(1)
        truth[:, i, 1] = 1 - F.cosine_similarity(middle.double(), outputs[i].double(), dim=-1).mean(1)
    torch.testing.assert_close(measured(tiny_model(), windows), truth, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_batches_do_not_matter_and_hooks_are_gone_afterwards():
    model, windows = tiny_model(), tiny_windows(5)
    torch.testing.assert_close(measured(model, windows, 1), measured(model, windows, 10**6), rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_low_precision_states_are_measured_in_float32():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 40, 32, generator=generator).bfloat16()
    after = before + (0.1 * torch.randn(2, 40, 32, generator=generator)).bfloat16()
    truth = 1 - F.cosine_similarity(before.double(), after.double(), dim=-1).mean(1)
    torch.testing.assert_close(_turn(before, after), truth, rtol=0, atol=1e-6)


def test_parallel_sublayers_and_single_ones_are_refused():
    with pytest.raises(ArchitectureError, match="use score: loss"):
        SublayerStats(tiny_model("gptj"))
    with pytest.raises(ArchitectureError, match="one sublayer"):
        SublayerStats(tiny_model("mamba"))
    with pytest.raises(NoDataError):
        _ = SublayerStats(tiny_model()).change
