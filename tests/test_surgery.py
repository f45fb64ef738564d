import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import NUM_LAYERS, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm_streamline import surgery
from llm_streamline.arch import find_arch, get_layers, silence
from llm_streamline.blueprint import build_blueprint, compare_layers
from llm_streamline.errors import ArchitectureError, PlanError
from llm_streamline.families import FAMILIES, Family
from llm_streamline.surgery import apply_plan, keep_layers, shared_view


def logits_of(model):
    return model(tiny_tokens(), use_cache=False).logits


def plan_of(sources, num_layers=NUM_LAYERS):
    return SimpleNamespace(model=SimpleNamespace(num_layers=num_layers), edits=(), layer_sources=lambda: tuple(sources))


def test_apply_plan_keeps_the_layers_the_plan_names():
    planned, kept = tiny_model("qwen3"), tiny_model("qwen3")
    assert apply_plan(planned, plan_of([0, 3, 7])) == [0, 3, 7]
    keep_layers(kept, [0, 3, 7])
    assert torch.equal(logits_of(planned), logits_of(kept))


def test_a_plan_for_another_depth_is_refused():
    with pytest.raises(PlanError, match="for a model of 12 layers, this one has 8"):
        apply_plan(tiny_model("llama"), plan_of([0], num_layers=12))


def test_kept_layers_are_the_same_objects_and_repeats_are_copies():
    model = tiny_model("llama")
    before = list(get_layers(model))
    keep_layers(model, [4, 4, 2])
    after = get_layers(model)
    assert after[0] is before[4]
    assert after[2] is before[2]
    assert after[1] is not before[4]
    assert torch.equal(after[1].mlp.up_proj.weight, before[4].mlp.up_proj.weight)
    assert [layer.self_attn.layer_idx for layer in after] == [0, 1, 2]
    assert all(layer.self_attn.config is model.config for layer in after)


def test_cutting_draws_no_random_number():
    model = tiny_model("llama")
    state = torch.get_rng_state()
    keep_layers(model, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_refused_cut_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("qwen2_moe")
    before, config = logits_of(model), model.config.to_dict()

    def refuse(*_):
        raise ArchitectureError("no")

    monkeypatch.setattr(surgery, "compare_layers", refuse)
    with pytest.raises(ArchitectureError):
        keep_layers(model, [0, 3, 5])
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in get_layers(model)] == list(range(NUM_LAYERS))
    assert torch.equal(logits_of(model), before)
    with pytest.raises(ArchitectureError):
        keep_layers(model, [0, 99])
    assert torch.equal(logits_of(model), before)


def test_what_a_fresh_model_would_build_differently_is_refused():
    """A layer whose behaviour the config does not describe must not be saved as if it did."""
    model = tiny_model("gemma2")
    get_layers(model)[3].self_attn.sliding_window = 5
    with pytest.raises(ArchitectureError, match=r"layer 1 with self_attn\.sliding_window = 8.*kept there has 5"):
        keep_layers(model, [0, 3])
    dense, sparse = tiny_model("deepseek_v3"), tiny_model("deepseek_v3", first_k_dense_replace=3)
    with pytest.raises(ArchitectureError, match="after the cut"):
        compare_layers(get_layers(dense), get_layers(build_blueprint(sparse, sparse.config)), "deepseek_v3")


def test_behaviour_that_depends_on_the_index_is_found_without_knowing_the_family(monkeypatch):
    """DiffLlama computes a constant of each layer from its index; no config can say another one."""
    config = AutoConfig.for_model(
        "diffllama", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=160
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArchitectureError, match="diffllama is untested"):
        keep_layers(model, [0, 2])
    monkeypatch.setitem(FAMILIES, "diffllama", Family())
    keep_layers(model, [0, 1])  # a cut tail renumbers nothing
    with pytest.raises(ArchitectureError, match=r"layer 0 with self_attn\.lambda_init"):
        keep_layers(model, [1])


def test_cutting_the_tail_equals_loading_with_a_smaller_count(tmp_path):
    """transformers itself is the oracle: a checkpoint loaded with fewer layers is cut at the end."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=5)
    keep_layers(model, range(5))
    assert torch.equal(logits_of(model), logits_of(expected))


def test_a_sharded_model_is_refused():
    model = tiny_model("llama")
    model.lm_head.weight.__class__ = type("DTensor", (nn.Parameter,), {})
    with pytest.raises(ArchitectureError, match="sharded"):
        keep_layers(model, [0])


def test_all_layers_of_one_kind_can_go():
    """Masks and rotary tables of a kind that is no longer there must not be missed, before and after loading."""
    model = tiny_model("gemma3_text")
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    for sources in (full, [i for i in range(NUM_LAYERS) if i not in full]):
        model = tiny_model("gemma3_text")
        expected = logits_of(shared_view(model, sources))
        keep_layers(model, sources)
        assert torch.equal(logits_of(model), expected)
        fresh = type(model)(copy.deepcopy(model.config)).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits_of(fresh), expected)


def test_one_layer_is_enough():
    model = tiny_model("llama")
    keep_layers(model, [5])
    tokens = tiny_tokens(1, 4)
    assert model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 8)
    keep_layers(model, [0, 0])  # and can be cut, or stacked, again
    assert [layer.self_attn.layer_idx for layer in get_layers(model)] == [0, 1]


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gemma3", "gpt2", "mistral", "llama4_text"])
def test_the_attention_implementation_is_kept(name):
    """Eager attention takes no mask for causal: a fresh config's default must not slip in."""
    model = tiny_model(name)
    expected = logits_of(shared_view(model, [0, 5, 6]))
    model.set_attn_implementation("eager")
    view = shared_view(model, [0, 5, 6])
    torch.testing.assert_close(logits_of(view), expected, atol=1e-4, rtol=0)
    keep_layers(model, [0, 5, 6])
    assert model.config._attn_implementation == view.config._attn_implementation == "eager"
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "mixtral"])
def test_lower_precision_changes_nothing_about_the_cut(name, dtype):
    model = tiny_model(name).to(dtype)
    arch = find_arch(model)
    expected = logits_of(shared_view(model, [0, 1, 4, 5]))
    silenced = copy.deepcopy(model)
    for index in (2, 3, 6, 7):
        silence(get_layers(silenced)[index], arch)
    assert torch.equal(logits_of(silenced), expected)
    keep_layers(model, [0, 1, 4, 5])
    assert torch.equal(logits_of(model), expected)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_view_shares_every_tensor_and_leaves_no_trace():
    model = tiny_model("gemma3_text")
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    view = shared_view(model, [0, 5, 1])
    logits_of(view)
    ours = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in ours for p in view.parameters())
    assert model.config.to_dict() == config
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert len(get_layers(model)) == NUM_LAYERS
    assert view.config.num_hidden_layers == len(get_layers(view)) == 3


class PassOn(nn.Module):
    """Not a decoder layer, but can stand for one."""

    def __init__(self, layer):
        super().__init__()
        self.kind = getattr(layer, "attention_type", None)

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma3", "gpt_neox", "gpt2", "mamba"])
def test_replacements_stand_where_they_are_put(name):
    model = tiny_model(name)
    expected = logits_of(shared_view(model, [0, 1, 2, 4, 6, 7]))
    layers = get_layers(model)
    view = shared_view(model, [0, 1, 2, 4, 5, 6, 7], {4: PassOn(layers[5])})
    torch.testing.assert_close(logits_of(view), expected, atol=1e-5, rtol=0)
    assert find_arch(view).layers == find_arch(model).layers
    with pytest.raises(ArchitectureError, match="no layer 7 to replace"):
        shared_view(model, [0, 1, 2, 4, 5, 6, 7], {7: PassOn(layers[5])})


def test_gradients_reach_a_replacement_through_shared_layers():
    model = tiny_model("qwen3")
    trained = copy.deepcopy(get_layers(model)[2]).requires_grad_(True)
    view = shared_view(model, [0, 1, 2, 5, 6, 7], {2: trained})
    logits_of(view).square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_view_of_a_dispatched_model_runs_its_own_layers():
    """accelerate stores a forward bound to the module; a plain copy would run the original's layers."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model("llama")
    expected = logits_of(shared_view(model, [0, 1]))
    for module in (model, model.model):
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    view = shared_view(model, [0, 1])
    torch.testing.assert_close(logits_of(view), expected)
    assert len(get_layers(model)) == NUM_LAYERS


def test_the_device_map_follows_the_layers():
    model = tiny_model("llama")
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.1": 0, "model.layers.10": 1, "model.layers.6": "disk"}
    keep_layers(model, [1, 6, 6])
    assert model.hf_device_map == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }


def test_an_offloaded_layer_cannot_be_copied():
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model("llama"), execution_device="cpu")
    with pytest.raises(ArchitectureError, match="layer 3 is offloaded"):
        keep_layers(model, [3, 3])


def test_generation_settings_are_kept():
    model = tiny_model("llama")
    model.generation_config.temperature = 0.3
    keep_layers(model, [0, 1])
    assert model.generation_config.temperature == 0.3
