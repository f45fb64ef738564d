"""What a GGUF file of ours says, and what is refused; `test_gguf_llama_cpp.py` has llama.cpp judge the numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tokenizers import Regex, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent))
gguf = pytest.importorskip("gguf")
from export_tokenizers import merging_tokenizer, metaspace_tokenizer
from folders import CHAT_TEMPLATE, byte_tokenizer, edit_json

from llm_streamline.errors import (
    ArchitectureError,
    ConfigError,
    MissingExtraError,
    NumericsError,
    OutputError,
    SourceError,
)
from llm_streamline.export import gguf_quantise
from llm_streamline.export.gguf import export_gguf
from llm_streamline.export.gguf_tokenizer import tokenizer_metadata
from llm_streamline.sources import load_model, model_folder, resolve_model

FULL, SLIDING = "full_attention", "sliding_attention"


def saved(folder: Path, name: str = "llama", tokenizer=None, **overrides):
    model = tiny_model(name, **{"vocab_size": 272} | overrides)
    model.save_pretrained(folder)
    (tokenizer or merging_tokenizer()).save_pretrained(folder)
    return model


def fields(path: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_metadata_and_tokenizer(tmp_path):
    saved(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    exported = export_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    found = fields(exported.path)
    expected = {
        "general.architecture": "llama",
        "general.name": "model",
        "general.file_type": 0,
        "llama.block_count": 8,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 12345.0,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 272,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["tokenizer.ggml.tokens"][:3] == ["<pad>", "<s>", "</s>"]
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD271]"
    assert found["tokenizer.ggml.token_type"] == [3] * 3 + [1] * 258 + [5] * 11
    assert exported.num_bytes == exported.path.stat().st_size
    assert exported.warnings == ()


BACK = {
    "llama": {},
    "llama_tied_bias": {"attention_bias": False, "mlp_bias": False},
    "qwen3": {"layer_types": [FULL] * 8, "head_dim": 128},  # transformers does not read another size from a GGUF file
    "phi3": {"sliding_window": None},
    "gemma3_text": {
        "layer_types": [SLIDING] * 5 + [FULL] + [SLIDING] * 2,
        "head_dim": 256,  # transformers takes the default scale of queries, which is that of heads of 256
        "query_pre_attn_scalar": 256,
    },
}


@pytest.mark.parametrize("name", BACK)
def test_loading_it_back_gives_the_same_logits(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_STREAMLINE_CACHE", str(tmp_path / "cache"))
    # transformers makes of each Gemma file a tokenizer with byte fallback, whatever the file says
    tokenizer = metaspace_tokenizer() if name == "gemma3_text" else merging_tokenizer()
    model = saved(tmp_path / "model", name, tokenizer, **BACK[name] | {"vocab_size": 320})
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "F32")
    back = load_model(resolve_model(tmp_path / "m.gguf"), "float32")
    tokens = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(back.model(tokens).logits, model(tokens).logits, rtol=0, atol=2e-5)
    assert back.tokenizer("abc the ab")["input_ids"] == tokenizer("abc the ab")["input_ids"]
    assert back.tokenizer.chat_template == tokenizer.chat_template


def test_types_of_tensors(tmp_path):
    saved(tmp_path / "model", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(export_gguf(tmp_path / "model", tmp_path / "m.gguf", "Q4_0").path).tensors
    }
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    saved(tmp_path / "odd", intermediate_size=40)  # rows of 40 hold no whole block of 32
    tensors = gguf.GGUFReader(export_gguf(tmp_path / "odd", tmp_path / "odd.gguf", "Q8_0").path).tensors
    assert {t.tensor_type.name for t in tensors if "ffn_down" in t.name} == {"F16"}


def test_quantised_numbers_are_those_of_the_gguf_package(tmp_path):
    model = saved(tmp_path / "model", "qwen3", layer_types=[FULL] * 8)
    tensors = gguf.GGUFReader(export_gguf(tmp_path / "model", tmp_path / "m.gguf", "Q8_0").path).tensors
    found = next(tensor for tensor in tensors if tensor.name == "blk.3.ffn_up.weight")
    weight = model.model.layers[3].mlp.up_proj.weight.numpy()
    expected = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found.data, expected)


def test_gemma_windows_are_told_as_a_period(tmp_path):
    saved(tmp_path / "model", "gemma3_text", layer_types=([SLIDING] * 3 + [FULL]) * 2)
    found = fields(export_gguf(tmp_path / "model", tmp_path / "m.gguf").path)
    assert found["gemma3.attention.sliding_window_pattern"] == 4
    assert found["gemma3.attention.sliding_window"] == 8


def test_patterns_that_llama_cpp_would_count_wrong_are_refused(tmp_path):
    saved(tmp_path / "gemma", "gemma3_text")
    with pytest.raises(ArchitectureError, match=r"follow no period .*by counting.*whole groups of 6"):
        export_gguf(tmp_path / "gemma", tmp_path / "m.gguf")
    saved(tmp_path / "one", "gemma2", layer_types=[SLIDING] * 8)
    with pytest.raises(ArchitectureError, match="at least one layer of each kind"):
        export_gguf(tmp_path / "one", tmp_path / "m.gguf")
    saved(tmp_path / "nope", "smollm3")
    with pytest.raises(ArchitectureError, match=r"without rotary positions.*whole groups of 4"):
        export_gguf(tmp_path / "nope", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_what_llama_cpp_ignores_becomes_a_warning(tmp_path):
    saved(tmp_path / "model", "mistral")
    (warning,) = export_gguf(tmp_path / "model", tmp_path / "m.gguf").warnings
    assert "longer than 8 tokens" in warning


def test_refusals(tmp_path):
    saved(tmp_path / "model")
    with pytest.raises(ConfigError, match="no GGUF type 'INT8'; known: F32, F16"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf", "int8")
    with pytest.raises(SourceError, match=r"no config.json"):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    saved(tmp_path / "bloom", "bloom")
    with pytest.raises(ArchitectureError, match=r"no GGUF export for bloom.*convert_hf_to_gguf.py"):
        export_gguf(tmp_path / "bloom", tmp_path / "m.gguf")
    saved(tmp_path / "code")
    edit_json(tmp_path / "code" / "config.json", auto_map={"AutoModelForCausalLM": "modeling.X"})
    with pytest.raises(ArchitectureError, match="modelling code of its own"):
        export_gguf(tmp_path / "code", tmp_path / "m.gguf")
    saved(tmp_path / "plain", tokenizer=byte_tokenizer())
    with pytest.raises(SourceError, match="no merges"):
        export_gguf(tmp_path / "plain", tmp_path / "m.gguf")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer.json"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_file_that_is_there_stays_unless_told(tmp_path):
    saved(tmp_path / "model")
    out = tmp_path / "new" / "m.gguf"
    export_gguf(tmp_path / "model", out)
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(tmp_path / "model", out)
    export_gguf(tmp_path / "model", out, overwrite=True)
    with pytest.raises(OutputError, match="is a folder"):
        export_gguf(tmp_path / "model", tmp_path)
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]


def test_numbers_beyond_float16_are_refused_and_nothing_is_left(tmp_path):
    model = tiny_model("llama", vocab_size=272)
    model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    merging_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(NumericsError, match=r"1e\+05.*BF16 or F32"):
        export_gguf(tmp_path / "model", tmp_path / "out" / "m.gguf", "F16")
    assert list((tmp_path / "out").iterdir()) == []


def test_k_quants_need_a_binding(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    monkeypatch.setattr(gguf_quantise, "_BINDINGS", {"no_such_module": None})
    with pytest.raises(MissingExtraError, match=r"cyllama.*llama-quantize"):
        export_gguf(tmp_path / "model", tmp_path / "out" / "m.gguf", "Q4_K_M")
    assert list((tmp_path / "out").iterdir()) == []


# --- tokenizers


def split(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [(None, "gpt-2"), (SMOLLM, "smollm"), (split(WORDS % "{1,3}"), "llama-bpe"), (split(WORDS % ""), "qwen2")],
)
def test_the_way_text_is_cut_is_told_by_name(pre_tokenizer, name, tmp_path):
    merging_tokenizer(pre_tokenizer).save_pretrained(tmp_path)
    assert tokenizer_metadata(tmp_path, 272)["tokenizer.ggml.pre"] == name


def test_an_unknown_way_to_cut_text_is_refused_unless_named(tmp_path):
    merging_tokenizer(split(r"\w+|\W")).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"name in llama.cpp is not known here \(Split .*give that name"):
        tokenizer_metadata(tmp_path, 272)
    assert tokenizer_metadata(tmp_path, 272, pre="mpt")["tokenizer.ggml.pre"] == "mpt"


def test_byte_fallback_tokenizers_get_scores_in_the_order_of_merges(tmp_path):
    metaspace_tokenizer().save_pretrained(tmp_path)
    found = tokenizer_metadata(tmp_path, 320)
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert (kinds["<unk>"], kinds["<0x41>"], kinds["the"], kinds["<s>"]) == (2, 6, 1, 3)
    assert scores["th"] > scores["the"] > scores["\u2581the"] > scores["z"]


def test_a_second_end_of_text_becomes_the_end_of_turn(tmp_path):
    merging_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 260]}))
    found = tokenizer_metadata(tmp_path, 272)
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (2, 260)


@pytest.mark.slow
def test_the_demo_models_words_and_sizes_are_those_of_its_own_file(tmp_path):
    source = resolve_model("demo")
    exported = export_gguf(model_folder(source), tmp_path / "demo.gguf", "F16")
    ours, theirs = fields(exported.path), fields(source.path)
    compared = [key for key in theirs if key.startswith(("llama.", "tokenizer."))]
    assert len(compared) > 15
    assert {key: ours.get(key) for key in compared} == {key: theirs[key] for key in compared}
