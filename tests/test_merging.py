"""Layers that are linear combinations of layers, held to sums done by hand."""

import copy

import pytest
import torch
from plans import facts_of, replace
from tiny import tiny_model, tiny_tokens

from llm_streamline.arch import get_layers
from llm_streamline.config import TrainingConfig
from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.export.slices import to_slices
from llm_streamline.merging import check_mergeable, merged_layer, norm_parameters
from llm_streamline.plan import Merge, Plan
from llm_streamline.replacements.build import build_replacements, install_plan
from llm_streamline.surgery import apply_plan
from llm_streamline.training.student import Student

SOME = ["llama", "llama_tied_bias", "qwen3", "gemma2", "gpt2", "opt", "falcon_new", "phi3", "gpt_neo", "mamba"]
# two layers of the same kind and attention type side by side, also in the mixed rows
SPAN = (2, 4)


def merge(start, stop, weights, norms=None):
    norms = norms or (1.0, *[0.0] * (stop - start - 1))
    return Merge(start=start, stop=stop, weights=weights, norms=norms)


def plan_of(model, *edits):
    return Plan(model=facts_of(model), edits=edits)


@pytest.mark.parametrize("name", SOME)
def test_every_weight_is_the_sum_it_is_said_to_be(name):
    model = tiny_model(name)
    layers = [dict(layer.named_parameters()) for layer in get_layers(model)[2:5]]
    merged = merged_layer(model, merge(2, 5, (-1.0, 1.0, 1.0), (0.5, 0.0, 0.5)))
    norms = norm_parameters(merged)
    assert norms
    assert any(name.endswith("bias") for name in dict(merged.named_parameters())) == any("bias" in n for n in layers[0])
    for key, value in merged.named_parameters():
        a, b, c = (layer[key] for layer in layers)
        expected = 0.5 * a + 0.5 * c if key in norms else b + c - a
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_merging_equal_layers_changes_nothing(name):
    model = tiny_model(name)
    layers = get_layers(model)
    for index in (3, 4):
        layers[index].load_state_dict(layers[2].state_dict())
    merged = merged_layer(model, merge(2, 5, (-1.0, 1.0, 1.0), (-1.0, 1.0, 1.0)))
    assert all(torch.equal(value, layers[2].state_dict()[key]) for key, value in merged.state_dict().items())


def test_a_merge_is_linear():
    model, scaled = tiny_model(), tiny_model()
    for parameter in get_layers(scaled).parameters():
        parameter.mul_(3.0)
    edit = merge(2, 5, (-1.0, 1.0, 1.0))
    ours, theirs = merged_layer(model, edit), merged_layer(scaled, edit)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(3.0 * value, theirs.state_dict()[key])


def test_a_half_precision_sum_is_rounded_once():
    model = tiny_model().bfloat16()
    layers = [layer.mlp.up_proj.weight.double() for layer in get_layers(model)[1:7]]
    merged = merged_layer(model, merge(1, 7, (-4.0, 1.0, 1.0, 1.0, 1.0, 1.0)))
    assert torch.equal(merged.mlp.up_proj.weight, (sum(layers[1:]) - 4 * layers[0]).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_the_plan_leaves_one_layer_with_the_combined_weights(name):
    model, ids = tiny_model(name), tiny_tokens()
    edit = merge(*SPAN, (0.25, 0.75), (0.0, 1.0))
    expected = copy.deepcopy(model)
    for key, value in get_layers(expected)[2].named_parameters():
        other = dict(get_layers(expected)[3].named_parameters())[key]
        value.copy_(other if key in norm_parameters(get_layers(expected)[2]) else 0.25 * value + 0.75 * other)
    plan = plan_of(model, edit)
    apply_plan(expected, Plan(model=facts_of(model), edits=({"kind": "remove", "start": 3, "stop": 4},)))
    sources = apply_plan(model, plan)
    assert sources == [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)


def test_the_original_is_left_as_it_was():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    merged_layer(model, merge(2, 5, (-1.0, 1.0, 1.0)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_a_network_is_trained_above_a_merge_on_the_merged_layer():
    model, ids = tiny_model(), tiny_tokens()
    plan = plan_of(model, merge(1, 3, (0.5, 0.5)), replace(5, 7))
    networks = build_replacements(model, plan)
    student = Student(model, plan, networks, TrainingConfig(objective="lm"))
    losses = student.token_losses(ids)
    install_plan(model, plan, networks)
    logits = model(ids, use_cache=False).logits
    truth = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layers", "reason"),
    [
        ("mixtral", range(2, 4), "mixture of experts"),
        ("qwen3_moe", range(0, 2), "mixture of experts"),
        ("lfm2", range(0, 2), "are not alike"),
    ],
)
def test_layers_that_have_nothing_in_common_are_refused(name, layers, reason):
    with pytest.raises(ArchitectureError, match=reason):
        check_mergeable(tiny_model(name), layers)


def test_weights_that_are_not_there_are_refused():
    model = tiny_model().to("meta")
    with pytest.raises(ArchitectureError, match="offloaded"):
        merged_layer(model, merge(2, 4, (0.5, 0.5)))


def test_mergekit_is_not_told_a_lie():
    with pytest.raises(PlanError, match="mergekit"):
        to_slices(plan_of(tiny_model(), merge(2, 4, (0.5, 0.5))))
