"""Silenced sublayers: what is looked at before is what is applied, and nothing else changes."""

import copy

import pytest
import torch
from plans import facts_of
from tiny import TINY_ROWS, tiny_model, tiny_tokens

from llm_streamline.arch import find_arch, get_layers
from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.measure.edited import SilentLayers, plan_patches
from llm_streamline.measure.shared_prefix import SharedPrefix, Variant
from llm_streamline.plan import Network, Plan, Remove, Replace, Silence
from llm_streamline.schema import parse
from llm_streamline.surgery import apply_plan

EDITS = (
    Silence(start=1, stop=2, part="attention"),
    Remove(start=2, stop=3),
    Silence(start=4, stop=6, part="mlp"),
)


def plan_of(model, *edits):
    return Plan(model=facts_of(model), edits=edits)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_ROWS)
def test_the_view_is_the_applied_model_and_the_original_is_left_alone(name):
    model, ids = tiny_model(name), tiny_tokens()
    plan = plan_of(model, *EDITS)
    before = copy.deepcopy(model.state_dict())
    try:
        whole = copy.deepcopy(model)
        apply_plan(whole, plan)
    except ArchitectureError as problem:
        pytest.skip(str(problem))
    view = SharedPrefix(model, [Variant(plan.layer_sources(), plan_patches(model, plan, []))])
    (_, logits), *_ = view.run({"input_ids": ids})
    truth = whole(ids, use_cache=False).logits
    torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    original = model(ids, use_cache=False).logits
    assert not torch.allclose(original, truth, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "mixtral"])
def test_a_silent_sublayer_adds_exactly_nothing(name, part):
    """By the layer's own arithmetic: without attention a token's output hangs on that token alone."""
    model, ids = tiny_model(name), tiny_tokens()
    apply_plan(model, plan_of(model, Silence(start=0, stop=8, part=part)))
    if part == "attention":  # every token is computed as if it were alone (at its position)
        logits = model(ids, use_cache=False).logits
        changed = ids.clone()
        changed[:, :-1] = (ids[:, :-1] + 5) % 100 + 3
        assert torch.equal(model(changed, use_cache=False).logits[:, -1], logits[:, -1])
    else:
        layer, seen = get_layers(model)[3], []
        names = find_arch(model).family
        inner = layer.get_submodule(names.mlp_norm_out[0] if names.mlp_norm_out else names.mlp)
        inner.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        model(ids, use_cache=False)
        assert not seen[0].any()


def test_what_cannot_be_silenced_is_refused_and_nothing_is_changed():
    model = tiny_model("opt_post_norm")
    plan = plan_of(model, Remove(start=0, stop=1), Silence(start=1, stop=2, part="mlp"))
    with pytest.raises(ArchitectureError, match="layer norm stands after"):
        apply_plan(model, plan)
    assert len(get_layers(model)) == 8
    model = tiny_model("mamba")
    with pytest.raises(ArchitectureError, match="layer 3 of this mamba has no mlp"):
        apply_plan(model, plan_of(model, Silence(start=3, stop=4, part="mlp")))
    model = tiny_model()
    model.model.layers[2].to("meta")
    with pytest.raises(ArchitectureError, match="offloaded"):
        apply_plan(model, plan_of(model, Silence(start=2, stop=3, part="mlp")))


def test_a_plan_says_it_and_survives_the_file(tmp_path):
    model = tiny_model()
    plan = plan_of(model, *EDITS)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.layer_sources() == (0, 1, 3, 4, 5, 6, 7)
    assert plan.position_of(EDITS[2]) == 3
    assert "silence the mlp of 2 of 8 layers [4, 6)" in plan.describe()
    assert plan.digest() != plan_of(model, EDITS[1]).digest()


def test_a_linear_map_is_not_folded_into_a_silent_mlp():
    model = tiny_model()
    linear = Replace(start=3, stop=5, network=Network(kind="linear"), templates=())
    plan_of(model, Silence(start=2, stop=3, part="attention"), linear)
    data = {"model": facts_of(model), "edits": [Silence(start=1, stop=3, part="mlp"), linear]}
    with pytest.raises(PlanError, match="folded into layer 2, whose MLP is silenced"):
        parse(Plan, data, "plan", PlanError)


@torch.no_grad()
def test_plans_that_share_a_silent_layer_run_it_once():
    model, silent_layers = tiny_model(), SilentLayers()
    silent = Silence(start=1, stop=2, part="attention")
    plans = [plan_of(model, silent, Remove(start=i, stop=i + 1)) for i in (4, 5, 6)]
    variants = [Variant(p.layer_sources(), plan_patches(model, p, [], silent=silent_layers)) for p in plans]
    assert SharedPrefix(model, variants).num_layers_run == 7 + 2 + 3  # below the layer that is removed they are one
