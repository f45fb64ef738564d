"""Tiny random models of every architecture we edit: float32, seeded, milliseconds to build.

Weights are scaled so that every layer changes its input by about its own size and logits differ by whole units: a
wrong mask, a lost layer or a shifted position cannot hide in rounding. Windows of sliding and chunked attention are
shorter than `tiny_tokens`, and kinds of layers are mixed without a period, so that a stale index shows.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_LAYERS = 8
HIDDEN_SIZE = 32
VOCAB_SIZE = 160
WINDOW = 8  # keys a sliding or chunked layer sees
SEQ_LEN = 24

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE_HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16}
_SLIDING = "sliding_attention"
_FULL = "full_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL, _SLIDING, _FULL, _FULL]
_CHUNKED = [_FULL if kind == _FULL else "chunked_attention" for kind in _MIXED]
_LINEAR = [_FULL if kind == _FULL else "linear_attention" for kind in _MIXED]
_DELTA_NET = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class TinyRow:
    """One test case: a model type and what its config needs beyond the common sizes."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()  # common keys this family does not know
    wrapper: str | None = None  # model type of a multimodal config around it
    wrapper_config: dict[str, Any] = field(default_factory=dict)


def _row(model_type: str, *drop: str, **config: Any) -> TinyRow:
    return TinyRow(model_type, config, drop)


TINY_ROWS: dict[str, TinyRow] = {
    "llama": _row("llama"),
    "llama_tied_bias": _row("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": _row("mistral", sliding_window=WINDOW, head_dim=8),
    "qwen2": _row("qwen2", sliding_window=WINDOW, use_sliding_window=True, layer_types=_MIXED),
    "qwen2_tied": _row(
        "qwen2", tie_word_embeddings=True, use_sliding_window=True, max_window_layers=3, sliding_window=WINDOW
    ),
    "qwen3": _row("qwen3", sliding_window=WINDOW, use_sliding_window=True, layer_types=_MIXED, head_dim=16),
    "gemma2": _row("gemma2", sliding_window=WINDOW, layer_types=_MIXED, head_dim=16, query_pre_attn_scalar=16),
    "gemma3_text": _row(
        "gemma3_text", sliding_window=WINDOW, layer_types=_MIXED, head_dim=16, query_pre_attn_scalar=16
    ),
    "gemma3": TinyRow(
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": _MIXED, **_WIDE_HEADS},
        wrapper="gemma3",
        wrapper_config={
            "vision_config": {  # as deep as the language model: only the config tells them apart
                "hidden_size": 16,
                "num_hidden_layers": NUM_LAYERS,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": VOCAB_SIZE - 1,
            "boi_token_index": VOCAB_SIZE - 2,
            "eoi_token_index": VOCAB_SIZE - 3,
        },
    ),
    "phi3": _row("phi3", sliding_window=WINDOW),
    "opt": _row("opt", "intermediate_size", ffn_dim=48, word_embed_proj_dim=HIDDEN_SIZE, do_layer_norm_before=True),
    "opt_post_norm": _row("opt", "intermediate_size", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": _row("gpt2", "intermediate_size"),
    "gpt_neox": _row("gpt_neox", use_parallel_residual=True, rotary_pct=0.5),
    "gpt_neox_sequential": _row("gpt_neox", use_parallel_residual=False),
    "mixtral": _row("mixtral", sliding_window=WINDOW, **_EXPERTS),
    "qwen2_moe": _row(
        "qwen2_moe",
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=_MIXED,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        **_EXPERTS,
    ),
    "qwen3_moe": _row("qwen3_moe", head_dim=16, mlp_only_layers=[1, 5], sliding_window=None, **_EXPERTS),
    "qwen3_moe_step": _row("qwen3_moe", head_dim=16, decoder_sparse_step=3, **_EXPERTS),
    "gemma": _row("gemma", head_dim=16),
    "phi": _row("phi", partial_rotary_factor=0.5),
    "phi_qk_norm": _row("phi", qk_layernorm=True),
    "gpt_neo": _row("gpt_neo", attention_types=[[["global", "local"], 2], [["local"], 4]], window_size=WINDOW),
    "gptj": _row("gptj", "intermediate_size", rotary_dim=4),
    "bloom": _row("bloom", "intermediate_size"),
    "bloom_post_norm": _row("bloom", "intermediate_size", apply_residual_connection_post_layernorm=True),
    "falcon": _row("falcon", multi_query=True, parallel_attn=True, new_decoder_architecture=False, alibi=False),
    "falcon_new": _row("falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "falcon_alibi": _row("falcon", multi_query=False, parallel_attn=False, new_decoder_architecture=False, alibi=True),
    "stablelm": _row("stablelm", partial_rotary_factor=0.5),
    "stablelm_parallel": _row("stablelm", use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True),
    "starcoder2": _row("starcoder2", sliding_window=WINDOW),
    "olmo": _row("olmo", clip_qkv=8.0),
    "olmo2": _row("olmo2"),
    "granite": _row(
        "granite", residual_multiplier=0.7, embedding_multiplier=2.0, logits_scaling=0.5, attention_multiplier=0.3
    ),
    "cohere": _row("cohere", logit_scale=0.5, use_qk_norm=False),
    "cohere_qk_norm": _row("cohere", logit_scale=0.5, use_qk_norm=True),
    "cohere2": _row("cohere2", logit_scale=0.5, sliding_window=WINDOW, layer_types=_MIXED),
    "smollm3": _row(
        "smollm3",
        use_sliding_window=True,
        sliding_window=WINDOW,
        no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 0],
        layer_types=_MIXED,
    ),
    "gpt_oss": _row("gpt_oss", head_dim=8, sliding_window=WINDOW, layer_types=_MIXED, **_EXPERTS),
    "deepseek_v3": _row(
        "deepseek_v3",
        first_k_dense_replace=2,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
    ),
    "glm4": _row("glm4", head_dim=8),
    "ernie4_5": _row("ernie4_5", head_dim=8, use_bias=True),
    "exaone4": _row("exaone4", sliding_window=WINDOW, layer_types=_MIXED),
    "lfm2": _row(
        "lfm2",
        layer_types=["conv", "full_attention", "conv", "full_attention", "conv", "full_attention", "conv", "conv"],
        block_auto_adjust_ff_dim=False,
    ),
    "mamba": _row("mamba", "num_attention_heads", "num_key_value_heads", state_size=8),
    "llama4_text": _row(
        "llama4_text",
        head_dim=8,
        moe_layers=[1, 2, 6],
        no_rope_layers=[1, 0, 1, 1, 0, 1, 1, 0],
        layer_types=_CHUNKED,
        attention_chunk_size=WINDOW,
        intermediate_size_mlp=40,
        attn_temperature_tuning=False,
        **_EXPERTS,
    ),
    "olmo3": _row("olmo3", sliding_window=WINDOW, layer_types=_MIXED),
    "olmoe": _row("olmoe", **_EXPERTS),
    "glm": _row("glm", head_dim=8),
    "glm4_moe": _row(
        "glm4_moe",
        head_dim=8,
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        use_qk_norm=True,
        **_EXPERTS,
    ),
    "seed_oss": _row("seed_oss", head_dim=8),
    "ministral3": _row("ministral3", head_dim=8, sliding_window=WINDOW),
    "ernie4_5_moe": _row(
        "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=2, **_EXPERTS
    ),
    "granitemoe": _row("granitemoe", residual_multiplier=0.7, **_EXPERTS),
    "phimoe": _row("phimoe", sliding_window=WINDOW, **_EXPERTS),
    "deepseek_v2": _row(
        "deepseek_v2",
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        **_EXPERTS | {"num_key_value_heads": 4},
    ),
    "nemotron": _row("nemotron", head_dim=8),
    "arcee": _row("arcee", head_dim=8),
    "gpt_bigcode": _row("gpt_bigcode", "intermediate_size", "num_key_value_heads", multi_query=True),
    "qwen3_next": _row("qwen3_next", layer_types=_LINEAR, mlp_only_layers=[3], **_DELTA_NET, **_EXPERTS),
    "qwen3_5_text": _row("qwen3_5_text", layer_types=_LINEAR, **_DELTA_NET),
}


def tiny_config(name: str, **overrides: Any):
    """The config of the test case `name`; `overrides` (num_hidden_layers=6, head_dim=16 ...) win over its row."""
    row = TINY_ROWS[name]
    settings = {key: value for key, value in _COMMON.items() if key not in row.drop} | row.config | overrides
    for key, value in settings.items():  # a shorter model takes the head of each per-layer list
        if isinstance(value, list) and len(value) == NUM_LAYERS and key not in overrides:
            settings[key] = value[: settings["num_hidden_layers"]]
    if row.wrapper is None:
        return AutoConfig.for_model(row.model_type, **settings)
    text = AutoConfig.for_model(row.model_type, **settings).to_dict()
    return AutoConfig.for_model(row.wrapper, text_config=text, **row.wrapper_config)


def tiny_model(name: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of the test case `name`, in eval mode, without gradients.

    Args:
        name: a key of `TINY_ROWS`.
        seed: of the weights; the global generator is left as it was.
        overrides: config keys that win over the row's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides)).float()
        _spread_weights(model)
    for name in model.config.sub_configs:
        getattr(model.config, name).dtype = torch.float32  # as loading sets it, building does not
    return model.eval().requires_grad_(False)


def tiny_tokens(batch: int = 2, seq_len: int = SEQ_LEN, *, seed: int = 0) -> torch.Tensor:
    """(batch, seq_len) int64 token ids without special ids: the first three and, of a wrapper, the last three."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE - 3, (batch, seq_len), generator=generator)


@torch.no_grad()
def _spread_weights(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases: every channel its own value
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight.normal_(0, 1)
