import json
import logging
import subprocess
from types import SimpleNamespace

import pytest
import torch
from folders import CHAT_TEMPLATE, byte_tokenizer, tiny_llama
from tiny import tiny_model, tiny_tokens

from llm_streamline import checkpoint, files, reload
from llm_streamline import proof as proof_module
from llm_streamline.checkpoint import prove_checkpoint, save_checkpoint
from llm_streamline.errors import OutputError, ProofError
from llm_streamline.proof import Check, Proof, repetition
from llm_streamline.sources import load_model, resolve_model
from llm_streamline.sources.weights import read_weights


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def same_process(monkeypatch):
    """Answer in this process: what is measured stays the same, and seconds of imports are saved."""

    def answer(folder):
        try:
            reload.answer(folder)
        except Exception as error:  # as the process would die
            return f"died: {str(error).splitlines()[-1]}"

    monkeypatch.setattr(proof_module, "_run_child", answer)


def saved_config(out) -> dict:
    return json.loads((out / "config.json").read_text())


def checks(proof: Proof) -> dict[str, Check]:
    return {check.name: check for check in proof.checks}


# --- saving


def test_what_is_saved_is_what_loads(tmp_path, tokenizer):
    model = tiny_llama()
    out = save_checkpoint(model, tokenizer, tmp_path / "out", extra_files={"README.md": "# Card", "x/y.bin": b"\0"})
    loaded = load_model(resolve_model(out))
    ids = tiny_tokens()
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert (out / "README.md").read_text() == "# Card"
    assert (out / "x" / "y.bin").read_bytes() == b"\0"
    assert (out / "generation_config.json").is_file()
    assert not [path for path in out.rglob("*") if path.name.startswith(".streamline-tmp")]


def test_saving_what_was_loaded_is_a_fixed_point(tmp_path, tokenizer):
    first = save_checkpoint(tiny_llama(), tokenizer, tmp_path / "1")
    loaded = load_model(resolve_model(first))
    second = save_checkpoint(loaded, loaded.tokenizer, tmp_path / "2")
    names = {path.name for path in first.iterdir()} - {"streamline"}
    assert names == {path.name for path in second.iterdir()} - {"streamline"}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    text = "".join(path.read_text() for path in second.glob("*.json"))
    assert str(tmp_path) not in text


def test_shards_of_a_larger_model_go_away(tmp_path, tokenizer):
    out = tmp_path / "out"
    save_checkpoint(tiny_llama(), tokenizer, out, max_shard_size="8KB")
    assert len(read_weights(out).files) > 1
    save_checkpoint(tiny_llama(num_hidden_layers=2), tokenizer, out)
    assert [path.name for path in sorted(out.glob("model*"))] == ["model.safetensors"]
    assert load_model(resolve_model(out)).model.config.num_hidden_layers == 2


def test_config_and_memory_agree_on_dtype(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    model.model.layers[1].float()  # a replacement trained in float32
    out = save_checkpoint(model, None, tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert saved_config(out)["dtype"] == "bfloat16"
    assert {header.dtype for header in read_weights(out).tensors.values()} == {"BF16"}


def test_nothing_tells_of_the_source(tmp_path):
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config.name_or_path = "/somewhere/on/this/machine"
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    model.config.architectures = ["SomethingElse"]
    config = saved_config(save_checkpoint(model, None, tmp_path / "out"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"quantization_config", "auto_map", "_name_or_path", "name_or_path"} & set(config)


def test_settings_without_effect_do_not_stop_the_save(tmp_path, tokenizer):
    model = tiny_llama()
    for key, value in {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "length_penalty": 2.0}.items():
        setattr(model.generation_config, key, value)
    model.generation_config.do_sample = False
    out = save_checkpoint(model, tokenizer, tmp_path / "out")
    saved = json.loads((out / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "top_k", "min_p", "length_penalty"} & set(saved)
    assert saved["eos_token_id"] == 2
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.6  # now it has an effect, and stays
    out = save_checkpoint(model, tokenizer, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6


def test_caching_is_on_after_training(tmp_path):
    model = tiny_llama()
    model.config.use_cache = model.generation_config.use_cache = False  # as gradient checkpointing leaves it
    out = save_checkpoint(model, None, tmp_path / "out")
    assert saved_config(out)["use_cache"] is True
    assert json.loads((out / "generation_config.json").read_text())["use_cache"] is True


def test_older_readers_find_the_rope_base(tmp_path, tokenizer):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    for index, parameters in enumerate(({"rope_type": "default", "rope_theta": 12345.0}, scaled)):
        model = tiny_llama(rope_parameters=parameters)
        out = save_checkpoint(model, tokenizer, tmp_path / str(index))
        assert saved_config(out)["rope_theta"] == parameters["rope_theta"]
        reloaded = load_model(resolve_model(out)).model
        assert reloaded.config.rope_parameters == model.config.rope_parameters
        ids = tiny_tokens()
        assert torch.equal(reloaded(ids).logits, model(ids).logits)
    assert saved_config(out)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    out = save_checkpoint(model, None, tmp_path / "out")
    assert read_weights(out).num_elements == sum(p.numel() for p in model.parameters())
    loaded = load_model(resolve_model(out), with_tokenizer=False).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["../x", "/x", "streamline/run.json", "", "a/../../x"])
def test_extra_files_stay_beside_the_weights(tmp_path, name):
    with pytest.raises(OutputError, match="no name for a file"):
        save_checkpoint(tiny_llama(), None, tmp_path / "out", extra_files={name: "x"})
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, tokenizer, monkeypatch):
    out = save_checkpoint(tiny_llama(), tokenizer, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_checkpoint(tiny_llama(num_hidden_layers=2), tokenizer, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_model_larger_than_the_disk_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match="0 MB are free"):
        save_checkpoint(tiny_llama(), None, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {"streamline", "run.json"}


def test_saving_on_a_full_disk(tmp_path, monkeypatch):
    place = tmp_path / "small"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setattr(checkpoint, "check_room", lambda *args: None)  # the disk fills up while we write
        with pytest.raises(OutputError, match="the disk is full") as caught:
            save_checkpoint(tiny_llama(hidden_size=64), None, place / "out")
        assert "\n" not in str(caught.value)
        assert {path.name for path in (place / "out").rglob("*")} == {"streamline", "run.json"}
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_wrappers_are_taken_off(tmp_path):
    wrapped = torch.nn.DataParallel(tiny_llama())
    out = save_checkpoint(wrapped, None, tmp_path / "out")
    assert resolve_model(out)
    assert "model.norm.weight" in read_weights(out).tensors


# --- the proof


def test_a_sound_checkpoint_is_proven_in_silence(tmp_path, tokenizer, capfd):
    model = tiny_llama()
    out = save_checkpoint(model, tokenizer, tmp_path / "out")
    proof = prove_checkpoint(out, model, tokenizer)
    assert proof.ok, proof
    assert list(checks(proof)) == ["reload", "logits", "cache", "tokenizer", "text"]
    assert checks(proof)["logits"].value == 0.0
    assert len(proof.texts) == 3
    proof.raise_if_failed()
    stored = json.loads((out / "streamline" / "proof.json").read_text())
    assert stored.pop("ok") is True
    assert Proof.model_validate(stored) == proof
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_proof_covers_half_precision(tmp_path, tokenizer, same_process, dtype):
    source = resolve_model(save_checkpoint(tiny_llama(), tokenizer, tmp_path / "float32"))
    loaded = load_model(source, dtype)
    out = save_checkpoint(loaded, tokenizer, tmp_path / "half")
    proof = prove_checkpoint(out, loaded.model, tokenizer)
    assert proof.ok, proof
    assert checks(proof)["logits"].value == 0.0
    assert "float32" in checks(proof)["cache"].detail
    assert {p.dtype for p in loaded.model.parameters()} == {loaded.dtype}


def test_rounded_rotary_tables_are_found_out(tmp_path, same_process):
    model = tiny_llama().to(torch.bfloat16)  # rounds the rotary frequencies too, which loading keeps in float32
    out = save_checkpoint(model, None, tmp_path / "out")
    assert not checks(prove_checkpoint(out, model, None))["logits"].ok


@pytest.mark.parametrize("name", ["qwen3", "llama_tied_bias", "gpt2", "gemma3"])
def test_other_families_are_proven(tmp_path, tokenizer, same_process, name):
    model = tiny_model(name, vocab_size=272, max_position_embeddings=256)
    out = save_checkpoint(model, tokenizer, tmp_path / "out")
    proof = prove_checkpoint(out, model, tokenizer)
    assert proof.ok, proof


def test_a_checkpoint_that_is_not_the_model_is_found_out(tmp_path, tokenizer, same_process):
    model = tiny_llama()
    out = save_checkpoint(model, tokenizer, tmp_path / "out")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 0.5  # memory moves on, the file does not
    other = byte_tokenizer()
    other.chat_template = "another"
    proof = prove_checkpoint(out, model, other)
    assert not proof.ok
    assert [check.name for check in proof.checks if not check.ok] == ["logits", "tokenizer"]
    with pytest.raises(ProofError, match=r"not sound: logits .*tokenizer \(has another chat template\)") as caught:
        proof.raise_if_failed()
    assert caught.value.exit_code == 1


def test_degenerate_text_alone_can_be_accepted(caplog):
    sound, looping = Check(name="logits", ok=True, detail="equal"), Check(name="text", ok=False, detail="3 of 3 loop")
    with pytest.raises(ProofError, match=r"text .3 of 3 loop"):
        Proof(checks=(sound, looping), seconds=0).raise_if_failed()
    Proof(checks=(sound, looping), seconds=0).raise_if_failed(accept_degenerate_text=True)
    assert "3 of 3 loop" in caplog.text
    wrong = Check(name="logits", ok=False, detail="differ")
    with pytest.raises(ProofError, match="logits"):
        Proof(checks=(wrong, looping), seconds=0).raise_if_failed(accept_degenerate_text=True)


def test_stale_indices_and_windows_are_found_out(tmp_path, same_process):
    # the right weights, but a config that gives the layers other kinds of attention than they have in memory
    model = tiny_model("qwen3")
    out = save_checkpoint(model, None, tmp_path / "out")
    assert prove_checkpoint(out, model, None).ok
    config = saved_config(out)
    config["layer_types"] = config["layer_types"][::-1]
    (out / "config.json").write_text(json.dumps(config))
    assert not checks(prove_checkpoint(out, model, None))["logits"].ok


def test_a_process_that_dies_is_a_failed_check(tmp_path):
    model = tiny_llama()
    out = save_checkpoint(model, None, tmp_path / "out")
    (out / "model.safetensors").write_bytes(b"")
    proof = prove_checkpoint(out, model, None)
    assert [(check.name, check.ok) for check in proof.checks] == [("reload", False)]
    assert "could not load and run it" in proof.checks[0].detail
    assert "\n" not in proof.checks[0].detail


def test_a_random_layer_is_found_out(tmp_path, same_process):
    # the config asks for more layers than the file holds: transformers makes one up, with a warning at most
    model = tiny_llama()
    out = save_checkpoint(model, None, tmp_path / "out")
    config = saved_config(out) | {"num_hidden_layers": 4}
    (out / "config.json").write_text(json.dumps(config))
    proof = prove_checkpoint(out, model, None)
    assert "missing keys" in checks(proof)["reload"].detail
    assert not checks(proof)["logits"].ok


def test_values_that_are_not_finite_fail(tmp_path, same_process):
    model = tiny_llama()
    model.model.norm.weight[0] = float("nan")
    out = save_checkpoint(model, None, tmp_path / "out")
    proof = prove_checkpoint(out, model, None)
    assert not checks(proof)["logits"].ok
    assert not checks(proof)["cache"].ok


def test_text_is_judged_against_the_originals(tmp_path, tokenizer, same_process):
    model = tiny_llama()
    model.lm_head.weight.zero_()
    model.lm_head.weight[70] = 1  # whatever comes in, the same token or its opposite comes out
    model.model.norm.weight.fill_(1)
    out = save_checkpoint(model, tokenizer, tmp_path / "out")
    sound = ["A sentence that says something new with every word.", "So does this one, in its own way!"]
    proof = prove_checkpoint(out, model, tokenizer, against_text=sound)
    assert not checks(proof)["text"].ok
    assert checks(proof)["text"].value == 1
    proof = prove_checkpoint(out, model, tokenizer, against_text=["na na na na na na na na na na", ""])
    assert checks(proof)["text"].ok  # the original is no better


def test_repetition():
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(20))) == 0
    assert repetition([5] * 20) == pytest.approx(16 / 17)
    assert repetition([1, 2, 3, 4] * 5) == pytest.approx(1 - 4 / 17)


def test_saving_and_loading_print_nothing(tmp_path, tokenizer, capfd, caplog):
    caplog.set_level(logging.WARNING)
    load_model(resolve_model(save_checkpoint(tiny_llama(), tokenizer, tmp_path / "out")))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
