"""Our GGUF files opened by llama.cpp: the same logits as transformers, whatever the family, the rope and the cut."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("gguf")
from export_plans import removing
from export_tokenizers import merging_tokenizer, metaspace_tokenizer
from llama_cpp_runtime import LlamaCpp

from llm_streamline.export.gguf import export_gguf
from llm_streamline.export.gguf_cut import cut_gguf
from llm_streamline.export.gguf_families import GGUF_FAMILIES
from llm_streamline.surgery import apply_plan

VOCAB = 272
FULL, SLIDING = "full_attention", "sliding_attention"
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
# ggml looks GELU up in a table of float16; everything else agrees to float32's last digits
CLOSE, GELU_CLOSE = 1e-4, 2e-2
HALVES = {"partial_rotary_factor": 0.5, "rope_theta": 1e4}
FACTORS = {"short_factor": [1.1, 4.0], "long_factor": [1.1, 4.0], "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}

CASES = {
    "llama": ("llama", {}),
    "llama tied, with biases": ("llama_tied_bias", {}),
    "llama, rope llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"layer_types": [FULL] * 8}),
    "qwen2 tied": ("qwen2_tied", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"layer_types": [FULL] * 8}),
    "qwen3, rope yarn": (
        "qwen3",
        {
            "layer_types": [FULL] * 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": [FULL] * 8}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, half rotary": ("phi3", {"sliding_window": None, "rope_parameters": HALVES | {"rope_type": "default"}}),
    "phi3, longrope": (
        "phi3",
        {"sliding_window": None, "rope_parameters": HALVES | FACTORS | {"rope_type": "longrope"}},
    ),
    "gemma": ("gemma", GELU),
    "gemma2": ("gemma2", {"layer_types": [SLIDING, FULL] * 4, **GELU}),
    "gemma2, other period and scale": (
        "gemma2",
        {"layer_types": [SLIDING, SLIDING, FULL] * 2 + [SLIDING] * 2, "query_pre_attn_scalar": 7, **GELU},
    ),
    "gemma3": ("gemma3_text", {"layer_types": [SLIDING] * 5 + [FULL] + [SLIDING] * 2, **GELU}),
    "gemma3, other period and scale": (
        "gemma3_text",
        {"layer_types": ([SLIDING] * 3 + [FULL]) * 2, "query_pre_attn_scalar": 7, **GELU},
    ),
}


def tokens() -> list[int]:
    return torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def saved(name: str, folder: Path, **overrides):
    model = tiny_model(name, vocab_size=VOCAB, **overrides)
    model.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return model


def logits(model) -> np.ndarray:
    return model(torch.tensor([tokens()])).logits[0].numpy()


def tolerance(name: str) -> float:
    return GELU_CLOSE if name.startswith("gemma") else CLOSE


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_logits_of_transformers(case, tmp_path):
    name, overrides = CASES[case]
    model = saved(name, tmp_path / "model", **overrides)
    exported = export_gguf(tmp_path / "model", tmp_path / "m.gguf", "F32", name="tiny")
    theirs = LlamaCpp(exported.path).logits(tokens())
    np.testing.assert_allclose(theirs, logits(model), atol=tolerance(name))


def test_every_family_has_a_case():
    assert {tiny_model(name, **rest).config.model_type for name, rest in CASES.values()} == set(GGUF_FAMILIES)


CUTS = {
    "llama": ("llama", {}, [(2, 5)]),
    "qwen3": ("qwen3", {"layer_types": [FULL] * 8}, [(0, 1), (7, 8)]),
    "gemma2, one period": ("gemma2", {"layer_types": [SLIDING, FULL] * 4, **GELU}, [(2, 4)]),
    "gemma3, to another period": (
        "gemma3_text",
        {"layer_types": [SLIDING] * 5 + [FULL] + [SLIDING] * 2, **GELU},
        [(0, 3), (7, 8)],
    ),
    "smollm3, a whole group": (
        "smollm3",
        {"no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": [FULL] * 8},
        [(0, 4)],
    ),
}


@pytest.mark.parametrize("case", CUTS)
def test_a_cut_file_gives_the_logits_of_the_cut_model(case, tmp_path):
    name, overrides, spans = CUTS[case]
    model = saved(name, tmp_path / "model", **overrides)
    export_gguf(tmp_path / "model", tmp_path / "whole.gguf", "F32", name="tiny")
    plan = removing(8, *spans)
    cut = cut_gguf(tmp_path / "whole.gguf", tmp_path / "cut.gguf", plan)
    apply_plan(model, plan)
    np.testing.assert_allclose(LlamaCpp(cut.path).logits(tokens()), logits(model), atol=tolerance(name))


def test_generation_and_half_precision(tmp_path):
    model = saved("llama", tmp_path / "model")
    prompt = torch.tensor([tokens()[:8]])
    ours = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, use_cache=False)[0].tolist()
    for dtype in ("F32", "F16"):
        exported = export_gguf(tmp_path / "model", tmp_path / f"{dtype}.gguf", dtype)
        assert LlamaCpp(exported.path).greedy(prompt[0].tolist(), 20) == ours


@pytest.mark.parametrize("dtype", ["BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_K_M", "Q6_K"])
def test_smaller_types_are_opened_and_stay_near(dtype, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    model = saved("llama", tmp_path / "model", **sizes)
    exported = export_gguf(tmp_path / "model", tmp_path / "m.gguf", dtype)
    ours, theirs = logits(model), LlamaCpp(exported.path).logits(tokens())
    limit = {"BF16": 0.02, "Q8_0": 0.05, "Q6_K": 0.1, "Q5_1": 0.2}.get(dtype, 0.4)
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(ours) < limit
    whole = export_gguf(tmp_path / "model", tmp_path / "f32.gguf", "F32")
    assert exported.num_bytes < 0.7 * whole.num_bytes


TEXTS = ("abc abab", "  12 ab\n\n\tcab", "caf\u00e9 \U0001f600", "<s>ab</s>", "the and  theand <s>the</s> zq\u00e9")


@pytest.mark.parametrize("make", [merging_tokenizer, metaspace_tokenizer])
def test_llama_cpp_cuts_text_into_the_same_tokens(make, tmp_path):
    tiny_model("llama", vocab_size=320).save_pretrained(tmp_path / "model")
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "model")
    exported = export_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16")
    runtime = LlamaCpp(exported.path)
    for text in TEXTS:
        assert runtime.tokenize(text) == tokenizer(text)["input_ids"], text
