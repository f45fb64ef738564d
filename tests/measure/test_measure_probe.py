import copy

import pytest
import torch
from plans import facts_of, removing, replacing, tiny_windows
from tiny import tiny_model

from llm_streamline.measure.losses import token_losses
from llm_streamline.measure.probe import Probe
from llm_streamline.replacements.build import build_replacements, install_plan
from llm_streamline.replacements.starts import quick_start


def probe_of(model, batch_tokens=48):
    def start(plan):
        replacements = build_replacements(model, plan)
        for replacement in replacements:
            quick_start(replacement, model, 0)
        return replacements

    return Probe(model, facts_of(model), lambda: pytest.fail("not needed"), tiny_windows(5), start, batch_tokens, 0)


@torch.no_grad()
def plain_losses(model, windows):
    ids = windows.input_ids.long()
    return token_losses(model(ids, use_cache=False).logits, ids).double().mean(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen2"])
def test_the_loss_of_a_plan_is_that_of_the_installed_model(name):
    model = tiny_model(name)
    plans = [
        removing(model, 0, 2),
        removing(model, 3, 6),
        removing(model, 5, 8),
        replacing(model, 2, 5),
        replacing(model, 2, 5, "linear"),
        replacing(model, 1, 4, count=2, init="last"),
    ]
    probe = probe_of(model)
    original, losses = probe.losses(plans)
    torch.testing.assert_close(original, plain_losses(model, probe.validation))
    for plan, found in zip(plans, losses, strict=True):
        edited = copy.deepcopy(model)
        install_plan(edited, plan, probe.start(plan))
        torch.testing.assert_close(found, plain_losses(edited, probe.validation), rtol=1e-6, atol=1e-6)


def test_batches_do_not_change_the_loss():
    model = tiny_model()
    plans = [removing(model, 3, 6)]
    one, other = probe_of(model, 1).losses(plans), probe_of(model, 10**6).losses(plans)
    torch.testing.assert_close(one[1][0], other[1][0], rtol=1e-6, atol=1e-6)


def test_asking_leaves_the_model_as_it_was():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    probe_of(model).losses([removing(model, 3, 6), replacing(model, 2, 5)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_shared_prefix_runs_once_for_all_candidates():
    model = tiny_model()
    probe = probe_of(model, 10**6)
    calls = []
    model.model.layers[2].register_forward_hook(lambda *_: calls.append(2))
    probe.losses([removing(model, start, start + 2) for start in (4, 5, 6)])
    assert calls == [2]
