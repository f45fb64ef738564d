"""The families of decoder layers we edit, as data: one row each, and nothing here but rows.

A row holds only what cannot be found by looking at the model: which projections write to the residual stream, where
the norms stand, and what makes a family's settings impossible to edit. Every row is proven by the oracle tests of
`tests/test_oracles.py` on a tiny random model; a family without a row is refused. `docs/add-an-architecture.md` tells
how to add one.

Names are paths inside one decoder layer. A tuple of names means: those of them that a layer has (families mix kinds of
layers, for example dense and mixture-of-experts).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """Something that holds when the config key `key` is set to one of `values` (True means: to anything truthy)."""

    key: str
    values: tuple = (True,)
    reason: str = ""

    def holds(self, config) -> bool:
        """Whether the text config `config` meets the condition."""
        value = getattr(config, self.key, None)
        return any(bool(value) if wanted is True else value == wanted for wanted in self.values)


@dataclass(frozen=True)
class Family:
    """Facts of one family's decoder layer; the defaults are Llama's."""

    attention_out: tuple[str, ...] = ("self_attn.o_proj",)
    mlp_out: tuple[str, ...] = ("mlp.down_proj",)
    attention_norm_in: tuple[str, ...] = ("input_layernorm",)
    mlp_norm_in: tuple[str, ...] = ("post_attention_layernorm",)
    attention_norm_out: tuple[str, ...] = ()  # norm between the sublayer and the residual stream
    mlp_norm_out: tuple[str, ...] = ()
    silent_norm_weight: float = 0.0  # value of the norm_out weight that makes its output zero
    mlp: str = "mlp"  # the module that holds the MLP
    gate: tuple[str, ...] = ("mlp.gate_proj",)  # empty: the MLP has no gate
    up: tuple[str, ...] = ("mlp.up_proj",)
    gate_up: tuple[str, ...] = ()  # gate and up in one projection
    activation: tuple[str, ...] = ("hidden_act",)  # config keys, the first that is set wins
    fixed_activation: str | None = None  # where the config has no key for it
    width: tuple[str, ...] = ("intermediate_size",)  # config keys of the MLP's width
    parallel: bool | tuple[Condition, ...] = False  # attention and MLP read the same state; any condition suffices
    not_identity: tuple[Condition, ...] = ()  # settings under which no weights make the layer the identity
    refused: tuple[Condition, ...] = ()  # settings under which the family cannot be edited soundly
    cache_kinds: tuple[str, ...] = ()  # hybrid: layer types of which one must stay, because they know the length


_ONE_NORM = {"mlp_norm_in": ("input_layernorm",), "parallel": True}  # both branches read one norm
_EXPERTS = {"mlp_out": ("mlp.experts.down_proj", "mlp.down_proj")}
_NORM_OUT = {  # norms only behind the sublayers
    "attention_norm_in": (),
    "mlp_norm_in": (),
    "attention_norm_out": ("post_attention_layernorm",),
    "mlp_norm_out": ("post_feedforward_layernorm",),
}
_SANDWICH = {
    "attention_norm_out": ("post_attention_layernorm",),
    "mlp_norm_in": ("pre_feedforward_layernorm",),
    "mlp_norm_out": ("post_feedforward_layernorm",),
}
_GPT2_SCALE = "attention is divided by the layer's index plus one, so that a renumbered layer computes something else"
_NORMED_RESIDUAL = "the residual stream itself is normed in every layer"
_POST_NORM = "the layer norm stands after the residual addition"

# Multimodal wrappers whose language model we cut: model type of the wrapper's config.
WRAPPERS = ("gemma3",)

# Settings of any family that no edit of the config can follow.
REFUSED_SETTINGS = (
    Condition("num_kv_shared_layers", (True,), "its last layers reuse keys and values of earlier ones"),
    Condition("hidden_size_per_layer_input", (True,), "the input embeddings of all layers are packed in one tensor"),
)

# Families that were looked at and cannot be cut soundly, with the reason; those in neither table are untested.
REFUSED: dict[str, str] = {
    "gemma3n_text": "layers share keys and values, and the input embeddings of all layers are packed in one tensor",
    "gemma4_text": "layers share keys and values, and the input embeddings of all layers are packed in one tensor",
    "zamba": "one attention block is shared among layers",
    "zamba2": "attention blocks are shared among layers",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(**_SANDWICH, silent_norm_weight=-1.0, activation=("hidden_activation",)),
    "gemma3_text": Family(**_SANDWICH, silent_norm_weight=-1.0, activation=("hidden_activation",)),
    "phi3": Family(gate=(), up=(), gate_up=("mlp.gate_up_proj",)),
    "opt": Family(
        attention_out=("self_attn.out_proj",),
        mlp_out=("fc2",),
        attention_norm_in=("self_attn_layer_norm",),
        mlp_norm_in=("final_layer_norm",),
        mlp="",
        gate=(),
        up=("fc1",),
        activation=("activation_function",),
        width=("ffn_dim",),
        not_identity=(Condition("do_layer_norm_before", (False,), _POST_NORM),),
    ),
    "gpt2": Family(
        attention_out=("attn.c_proj",),
        mlp_out=("mlp.c_proj",),
        attention_norm_in=("ln_1",),
        mlp_norm_in=("ln_2",),
        gate=(),
        up=("mlp.c_fc",),
        activation=("activation_function",),
        width=("n_inner",),
        refused=(Condition("scale_attn_by_inverse_layer_idx", (True,), _GPT2_SCALE),),
    ),
    "gpt_neox": Family(
        attention_out=("attention.dense",),
        mlp_out=("mlp.dense_4h_to_h",),
        gate=(),
        up=("mlp.dense_h_to_4h",),
        parallel=(Condition("use_parallel_residual"),),
    ),
    "mixtral": Family(mlp_out=("mlp.experts.down_proj",), width=()),
    "qwen2_moe": Family(mlp_out=("mlp.experts.down_proj", "mlp.shared_expert.down_proj", "mlp.down_proj")),
    "qwen3_moe": Family(**_EXPERTS),
    "gemma": Family(),
    "phi": Family(attention_out=("self_attn.dense",), mlp_out=("mlp.fc2",), gate=(), up=("mlp.fc1",), **_ONE_NORM),
    "gpt_neo": Family(
        attention_out=("attn.attention.out_proj",),
        mlp_out=("mlp.c_proj",),
        attention_norm_in=("ln_1",),
        mlp_norm_in=("ln_2",),
        gate=(),
        up=("mlp.c_fc",),
        activation=("activation_function",),
    ),
    "gptj": Family(
        attention_out=("attn.out_proj",),
        mlp_out=("mlp.fc_out",),
        attention_norm_in=("ln_1",),
        mlp_norm_in=("ln_1",),
        gate=(),
        up=("mlp.fc_in",),
        activation=("activation_function",),
        width=("n_inner",),
        parallel=True,
    ),
    "bloom": Family(
        attention_out=("self_attention.dense",),
        mlp_out=("mlp.dense_4h_to_h",),
        gate=(),
        up=("mlp.dense_h_to_4h",),
        activation=(),
        fixed_activation="gelu_pytorch_tanh",
        width=("n_inner",),
        not_identity=(Condition("apply_residual_connection_post_layernorm", (True,), _NORMED_RESIDUAL),),
    ),
    "falcon": Family(
        attention_out=("self_attention.dense",),
        mlp_out=("mlp.dense_4h_to_h",),
        attention_norm_in=("ln_attn", "input_layernorm"),
        mlp_norm_in=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        gate=(),
        up=("mlp.dense_h_to_4h",),
        activation=("activation",),
        width=("ffn_hidden_size",),
        parallel=(Condition("parallel_attn"), Condition("new_decoder_architecture")),
    ),
    "stablelm": Family(
        mlp_norm_in=("post_attention_layernorm", "input_layernorm"),
        parallel=(Condition("use_parallel_residual"),),
    ),
    "starcoder2": Family(mlp_out=("mlp.c_proj",), gate=(), up=("mlp.c_fc",)),
    "olmo": Family(),
    "olmo2": Family(**_NORM_OUT),
    "granite": Family(),
    "cohere": Family(**_ONE_NORM),
    "cohere2": Family(**_ONE_NORM),
    "smollm3": Family(),
    "gpt_oss": Family(mlp_out=("mlp.experts.down_proj",), width=()),
    "deepseek_v3": Family(mlp_out=("mlp.experts.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj")),
    "glm4": Family(
        attention_norm_out=("post_self_attn_layernorm",),
        mlp_norm_out=("post_mlp_layernorm",),
        gate=(),
        up=(),
        gate_up=("mlp.gate_up_proj",),
    ),
    "ernie4_5": Family(),
    "exaone4": Family(**_NORM_OUT),
    "lfm2": Family(
        attention_out=("self_attn.out_proj", "conv.out_proj"),
        mlp_out=("feed_forward.w2",),
        attention_norm_in=("operator_norm",),
        mlp_norm_in=("ffn_norm",),
        mlp="feed_forward",
        gate=("feed_forward.w1",),
        up=("feed_forward.w3",),
        activation=(),
        fixed_activation="silu",
        width=(),  # the config's number is rounded when the model is built
        cache_kinds=("full_attention",),
    ),
    "mamba": Family(
        attention_out=("mixer.out_proj",),
        mlp_out=(),
        attention_norm_in=("norm",),
        mlp_norm_in=(),
        mlp="",
        gate=(),
        up=(),
        width=(),
    ),
    "llama4_text": Family(
        mlp_out=("feed_forward.experts.down_proj", "feed_forward.shared_expert.down_proj", "feed_forward.down_proj"),
        mlp="feed_forward",
        gate=("feed_forward.gate_proj",),
        up=("feed_forward.up_proj",),
        width=("intermediate_size_mlp",),
    ),
    "olmo3": Family(**_NORM_OUT),
    "olmoe": Family(mlp_out=("mlp.experts.down_proj",), width=()),
    "glm": Family(gate=(), up=(), gate_up=("mlp.gate_up_proj",)),
    "glm4_moe": Family(mlp_out=("mlp.experts.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj")),
    "seed_oss": Family(),
    "ministral3": Family(),
    "ernie4_5_moe": Family(mlp_out=("mlp.experts.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj")),
    "granitemoe": Family(mlp_out=("block_sparse_moe.experts.down_proj",), mlp="block_sparse_moe", width=()),
    "phimoe": Family(mlp_out=("mlp.experts.down_proj",), width=()),
    "deepseek_v2": Family(mlp_out=("mlp.experts.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj")),
    "nemotron": Family(gate=()),
    "arcee": Family(gate=()),
    "gpt_bigcode": Family(
        attention_out=("attn.c_proj",),
        mlp_out=("mlp.c_proj",),
        attention_norm_in=("ln_1",),
        mlp_norm_in=("ln_2",),
        gate=(),
        up=("mlp.c_fc",),
        activation=("activation_function",),
        width=("n_inner",),
    ),
    "qwen3_next": Family(
        attention_out=("self_attn.o_proj", "linear_attn.out_proj"),
        mlp_out=("mlp.experts.down_proj", "mlp.shared_expert.down_proj", "mlp.down_proj"),
        cache_kinds=("full_attention",),
    ),
    "qwen3_5_text": Family(attention_out=("self_attn.o_proj", "linear_attn.out_proj"), cache_kinds=("full_attention",)),
}
