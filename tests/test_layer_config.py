import pytest
from tiny import NUM_LAYERS, tiny_config
from transformers import AutoConfig, LlamaConfig

from llm_streamline.errors import ArchitectureError
from llm_streamline.layer_config import edited_config, mlp_width, text_config
from llm_streamline.runtimes import COUNTED, LLAMA_CPP, MLX, TENSORRT_LLM, VLLM, periodic_warnings


def test_lists_are_cut_in_order_and_the_original_is_left_alone():
    config = tiny_config("gemma2")
    before = config.to_dict()
    edited = edited_config(config, [5, 0, 1, 1])
    assert edited.layer_types == [config.layer_types[i] for i in (5, 0, 1, 1)]
    assert edited.num_hidden_layers == 4
    assert config.to_dict() == before


def test_counts_under_other_names_follow():
    assert edited_config(tiny_config("gpt2"), [0, 2]).n_layer == 2
    assert edited_config(tiny_config("gpt_neo"), [0, 2]).num_layers == 2


def test_gpt_neo_stores_its_list_in_another_form():
    config = tiny_config("gpt_neo")
    edited = edited_config(config, [1, 4, 2])
    assert edited.attention_types == [[["local"], 1], [["local"], 1], [["global"], 1]]
    assert edited.attention_layers == ["local", "local", "global"]


def test_every_nth_layer_becomes_a_list_because_cutting_shifts_the_count():
    config = tiny_config("qwen3_moe", decoder_sparse_step=3, mlp_only_layers=[2])  # experts in layer 5 only
    edited = edited_config(config, [1, 2, 4, 5, 6])
    assert (edited.decoder_sparse_step, edited.mlp_only_layers) == (1, [0, 1, 2, 4])


def test_index_lists_are_renumbered_and_forget_removed_layers():
    edited = edited_config(tiny_config("llama4_text"), [0, 2, 6, 6])  # experts in 1, 2, 6
    assert edited.moe_layers == [1, 2, 3]
    assert edited.no_rope_layers == [1, 1, 1, 1]


def test_an_index_list_that_becomes_empty_stays_empty():
    assert edited_config(tiny_config("llama4_text"), [0, 3, 4]).moe_layers == []


def test_leading_dense_layers_are_counted_and_must_lead():
    config = tiny_config("deepseek_v3")  # two dense layers
    assert edited_config(config, [1, 3, 4]).first_k_dense_replace == 1
    assert edited_config(config, [3, 4]).first_k_dense_replace == 0
    with pytest.raises(ArchitectureError, match="keep the dense layers first"):
        edited_config(config, [3, 1, 4])


def test_heads_that_predict_further_tokens_are_dropped_with_the_layers_they_follow():
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1)
    assert edited_config(config, range(NUM_LAYERS)).num_nextn_predict_layers == 1
    assert edited_config(config, [0, 1, 2]).num_nextn_predict_layers == 0


def test_a_hybrid_keeps_a_layer_that_knows_the_length():
    config = tiny_config("lfm2")
    kinds = config.layer_types
    convolutions = [i for i, kind in enumerate(kinds) if kind == "conv"]
    with pytest.raises(ArchitectureError, match="no full_attention layer would be left"):
        edited_config(config, convolutions)
    assert edited_config(config, [*convolutions, 1]).num_hidden_layers == len(convolutions) + 1


def test_settings_by_layer_number_are_renumbered():
    config = tiny_config("llama")
    config.per_layer_config = {2: {"intermediate_size": 24}, 5: {"intermediate_size": 80}}
    edited = edited_config(config, [0, 5, 2, 7])
    assert {int(k): v for k, v in edited.to_dict()["per_layer_config"].items()} == {
        1: {"intermediate_size": 80},
        2: {"intermediate_size": 24},
    }
    assert "per_layer_config" not in edited_config(config, [0, 1, 7]).to_dict()


def test_an_unknown_list_of_the_right_length_is_cut_and_reported(caplog):
    config = tiny_config("llama")
    config.widths = list(range(NUM_LAYERS))
    config.three = [1, 2, 3]
    edited = edited_config(config, [7, 1])
    assert (edited.widths, edited.three) == ([7, 1], [1, 2, 3])
    assert "config.widths has one entry a layer" in caplog.text


def test_a_rule_that_would_regenerate_what_was_cut_is_refused():
    class Regenerating(LlamaConfig):
        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            self.kinds = [index % 2 for index in range(self.num_hidden_layers)]

    config = Regenerating(num_hidden_layers=4)
    assert edited_config(config, [2, 3]).kinds == [0, 1]
    with pytest.raises(ArchitectureError, match=r"config\.kinds of this llama model comes back changed"):
        edited_config(config, [1, 3])


def test_token_lists_as_long_as_the_model_are_not_cut():
    config = tiny_config("llama", num_hidden_layers=3, eos_token_id=[2, 3, 4])
    assert edited_config(config, [0, 2]).eos_token_id == [2, 3, 4]


def test_a_list_shorter_than_the_model_is_a_contradiction():
    config = tiny_config("smollm3")
    config.no_rope_layers = [1, 1]
    with pytest.raises(ArchitectureError, match="2 entries for 8 layers"):
        edited_config(config, [0, 1])


def test_quantisation_that_names_layers_is_refused():
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "awq", "modules_to_not_convert": ["model.layers.3.mlp"]}
    with pytest.raises(ArchitectureError, match=r"layers\.3"):
        edited_config(config, [0, 1])


@pytest.mark.parametrize(("sources", "message"), [([], "no layer"), ([0, 8], "layer 8"), ([-1], "layer -1")])
def test_sources_outside_the_model_are_refused(sources, message):
    with pytest.raises(ArchitectureError, match=message):
        edited_config(tiny_config("llama"), sources)


def test_the_text_part_of_a_wrapper_is_cut_and_the_rest_kept():
    config = tiny_config("gemma3")
    edited = edited_config(config, [1, 3])
    assert edited.text_config.num_hidden_layers == len(edited.text_config.layer_types) == 2
    assert edited.vision_config.to_dict() == config.vision_config.to_dict()
    assert text_config(edited) is edited.text_config


def test_attention_implementation_dtype_and_name_survive():
    config = tiny_config("llama")
    config._attn_implementation, config.dtype, config._name_or_path = "eager", "bfloat16", "someone/model"
    edited = edited_config(config, [0])
    assert (edited._attn_implementation, edited.dtype, edited._name_or_path) == ("eager", "bfloat16", "someone/model")


def test_mlp_width():
    assert mlp_width(tiny_config("llama")) == 48
    assert mlp_width(tiny_config("gpt2")) == 4 * 32
    assert mlp_width(tiny_config("gemma3")) == 48
    assert mlp_width(tiny_config("mixtral")) is None


def test_runtimes_that_count_are_named_only_when_the_period_breaks():
    whole = AutoConfig.for_model("gemma3_text", num_hidden_layers=12)
    assert periodic_warnings(whole) == []
    assert periodic_warnings(edited_config(whole, range(6))) == []
    (warning,) = periodic_warnings(edited_config(whole, [*range(3), *range(6, 12)]))
    assert "layer_types of this gemma3_text is no longer periodic (first difference at layer 5)" in warning
    assert "llama.cpp" in warning
    assert periodic_warnings(edited_config(tiny_config("llama"), [0, 5])) == []
    smol = AutoConfig.for_model("smollm3", num_hidden_layers=8)
    (warning,) = periodic_warnings(edited_config(smol, [0, 1, 3, 4, 5, 6, 7]))
    assert warning.startswith("no_rope_layers")


def config_of_depth(family, num_layers):
    """The family's own config with its own rule for this many layers."""
    experts = {"interleave_moe_layer_step": 2} if family == "llama4_text" else {}
    return AutoConfig.for_model(family, num_hidden_layers=num_layers, **experts)


@pytest.mark.parametrize("family", COUNTED)
def test_each_counting_runtime_is_named_when_a_period_breaks_and_not_before(family):
    whole = config_of_depth(family, 24)
    assert periodic_warnings(whole) == []
    assert periodic_warnings(edited_config(whole, range(12))) == [], "a tail cut leaves the period"
    assert periodic_warnings(edited_config(whole, range(12, 24))) == [], "whole periods may go"
    warnings = periodic_warnings(edited_config(whole, [i for i in range(24) if i != 1]))
    assert len(warnings) == len(COUNTED[family])
    for warning, (key, runtimes) in zip(warnings, COUNTED[family], strict=True):
        assert warning.startswith(f"{key} of this {family} is no longer periodic (first difference at layer ")
        assert all(runtime in warning for runtime in runtimes)
        assert "transformers reads it from the config" in warning


@pytest.mark.parametrize(
    ("runtime", "families"),
    [
        (LLAMA_CPP, {"gemma2", "gemma3_text", "cohere2", "gpt_oss", "exaone4", "smollm3", "llama4_text"}),
        (MLX, {"gemma3_text", "cohere2", "exaone4", "llama4_text"}),
        (VLLM, {"gpt_oss"}),
        (TENSORRT_LLM, {"gpt_oss"}),
    ],
)
def test_which_families_a_runtime_counts_for(runtime, families):
    cut = {family: edited_config(config_of_depth(family, 24), [i for i in range(24) if i != 1]) for family in COUNTED}
    named = {family for family, config in cut.items() if any(runtime in text for text in periodic_warnings(config))}
    assert named == families
