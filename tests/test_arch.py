import pytest
import torch
from tiny import NUM_LAYERS, TINY_ROWS, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig

from llm_streamline.arch import (
    check_architecture,
    find_arch,
    fold_obstacle,
    get_layers,
    identity_possible,
    mlp_facts,
    silence_mlp,
)
from llm_streamline.errors import ArchitectureError
from llm_streamline.layer_config import mlp_width, text_config
from llm_streamline.structure import IndexField, index_fields


@pytest.mark.parametrize(
    ("name", "path", "norm", "head"),
    [
        ("llama", "model.layers", "model.norm", "lm_head"),
        ("opt", "model.decoder.layers", "model.decoder.final_layer_norm", "lm_head"),
        ("opt_post_norm", "model.decoder.layers", None, "lm_head"),
        ("gpt2", "transformer.h", "transformer.ln_f", "lm_head"),
        ("bloom", "transformer.h", "transformer.ln_f", "lm_head"),  # not word_embeddings_layernorm
        ("gpt_neox", "gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head"),
        ("mamba", "backbone.layers", "backbone.norm_f", "lm_head"),
        ("lfm2", "model.layers", "model.embedding_norm", "lm_head"),
        ("gemma3", "model.language_model.layers", "model.language_model.norm", "lm_head"),
    ],
)
def test_layers_norm_and_head_are_found(name, path, norm, head):
    model = tiny_model(name)
    arch = find_arch(model)
    assert (arch.layers, arch.final_norm, arch.head) == (path, norm, head)
    assert get_layers(model) is model.get_submodule(path)
    assert arch.num_layers == NUM_LAYERS
    assert model.get_submodule(arch.embeddings) is model.get_input_embeddings()


@pytest.mark.parametrize("name", TINY_ROWS)
def test_every_module_that_stores_its_index_is_found(name):
    model = tiny_model(name)
    fields = {(f.module, f.name) for f in find_arch(model).index_fields}
    for layer in get_layers(model):
        for path, module in layer.named_modules():
            for attribute in ("layer_idx", "layer_id"):
                assert not hasattr(module, attribute) or (path, attribute) in fields
    assert fields, "every family so far stores it somewhere"


def test_an_index_by_any_name_and_offset_is_found_by_its_values():
    class Layer(nn.Module):
        def __init__(self, place):
            super().__init__()
            self.number_of_block, self.width = place + 1, 4

    assert index_fields(nn.ModuleList(Layer(i) for i in range(4))) == (IndexField("", "number_of_block", 1),)


@pytest.mark.parametrize("name", TINY_ROWS)
def test_sublayers_named_by_the_row_exist(name):
    model = tiny_model(name)
    arch, text = find_arch(model), text_config(model.config)
    for layer in get_layers(model):
        facts = mlp_facts(layer, arch)
        names = (arch.attention_norm_in, arch.mlp_norm_in, arch.attention_norm_out, arch.mlp_norm_out)
        for path in (*names, facts.gate, facts.up, facts.gate_up, facts.down):
            assert path is None or layer.get_submodule(path) is not None
        if facts.kind in ("gated", "plain"):
            hidden = layer.get_submodule(facts.down).weight.shape[1 if facts.transposed else 0]
            assert hidden == text.hidden_size
            assert facts.activation is not None
            if arch.family.width:
                assert facts.width == mlp_width(model.config)
        if facts.kind == "gated":
            assert facts.gate_up or (facts.gate and facts.up)
        else:
            assert facts.gate is None


def test_kinds_of_mlp():
    def kind_of(name, layer):
        model = tiny_model(name)
        return mlp_facts(get_layers(model)[layer], find_arch(model)).kind

    assert kind_of("llama", 0) == "gated"
    assert kind_of("gpt2", 0) == "plain"
    assert kind_of("mamba", 0) == "none"
    assert [kind_of("deepseek_v3", i) for i in (1, 2)] == ["gated", "moe"]  # the first two layers are dense


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "granite", "cohere"])
def test_a_foldable_map_changes_the_stream_as_it_should(name):
    """T folded into the projection acts on exactly what silencing the MLP takes away."""
    model, silenced, folded = tiny_model(name), tiny_model(name), tiny_model(name)
    arch = find_arch(model)
    facts = mlp_facts(get_layers(model)[-1], arch)
    assert fold_obstacle(get_layers(model)[-1], arch) is None
    silence_mlp(get_layers(silenced)[-1], arch)
    down = get_layers(folded)[-1].get_submodule(facts.down)
    map_dd = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    down.weight.copy_(down.weight @ map_dd.T if facts.transposed else map_dd @ down.weight)
    if down.bias is not None:
        down.bias.copy_(map_dd @ down.bias)
    whole, without, mapped = (last_output(m) for m in (model, silenced, folded))
    torch.testing.assert_close(mapped, without + (whole - without) @ map_dd.T, atol=2e-4, rtol=0)


def last_output(model):
    states = []
    handle = get_layers(model)[-1].register_forward_hook(lambda _m, _a, out: states.append(out))
    model(torch.arange(3, 23)[None], use_cache=False)
    handle.remove()
    return states[0][0] if isinstance(states[0], tuple) else states[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3_text", "post_feedforward_layernorm stands between"),
        ("olmo2", "post_feedforward_layernorm stands between"),
        ("mixtral", "mixture of experts"),
        ("mamba", "no MLP"),
        ("opt_post_norm", "after the residual addition"),
    ],
)
def test_why_a_map_cannot_be_folded(name, reason):
    model = tiny_model(name)
    assert reason in fold_obstacle(get_layers(model)[3], find_arch(model))


def test_identity_is_impossible_where_the_stream_itself_is_normed():
    assert identity_possible(find_arch(tiny_model("opt")))
    assert not identity_possible(find_arch(tiny_model("opt_post_norm")))
    assert not identity_possible(find_arch(tiny_model("bloom_post_norm")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AutoConfig.for_model("gemma3n_text"), "gemma3n_text cannot be cut: layers share keys and values"),
        (AutoConfig.for_model("gemma3n"), "gemma3n_text cannot be cut"),
        (AutoConfig.for_model("zamba2"), "shared among layers"),
        (AutoConfig.for_model("t5"), "t5 is an encoder-decoder model"),
        (AutoConfig.for_model("bart"), "bart is an encoder-decoder model"),
        (AutoConfig.for_model("rwkv"), "rwkv is untested: .* tested families: .*bloom, cohere"),
        (AutoConfig.for_model("bert"), "bert is untested"),
        (AutoConfig.for_model("llava"), "llama inside llava is untested"),
        (tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (tiny_config("llama", num_kv_shared_layers=2), "reuse keys and values"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_cannot_be_cut_is_refused_with_the_reason(config, message):
    with pytest.raises(ArchitectureError, match=message):
        check_architecture(config)


def test_wrapped_models_are_refused():
    with pytest.raises(ArchitectureError, match="wrapper"):
        find_arch(nn.DataParallel(tiny_model("llama")))  # as torch.compile, DDP and adapters wrap
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(ArchitectureError, match="adapters that name layers by index"):
        find_arch(model)


def test_a_config_that_lies_about_the_layer_count_is_refused():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ArchitectureError, match="no list of 5 decoder layers"):
        find_arch(model)


def test_two_lists_of_the_same_length_are_ambiguous():
    model = tiny_model("llama")
    model.model.second = nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS))
    with pytest.raises(ArchitectureError, match="cannot tell which"):
        find_arch(model)


def test_a_list_inside_the_layers_is_no_candidate():
    model = tiny_model("stablelm_parallel", num_hidden_layers=4)  # one query norm for each of its four heads
    assert find_arch(model).layers == "model.layers"
