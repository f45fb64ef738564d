"""Streamed surgery gives the same files as surgery in memory, byte for byte."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_ROWS, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from export_plans import removing, replacing
from folders import tiny_folder

from llm_streamline.checkpoint import save_checkpoint
from llm_streamline.errors import ArchitectureError, OutputError, PlanError
from llm_streamline.export.stream import stream_plan
from llm_streamline.sources import load_model, resolve_model
from llm_streamline.surgery import apply_plan

NAMES = sorted(TINY_ROWS)


def model_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def in_memory(folder: Path, plan, out: Path, **options) -> Path:
    loaded = load_model(resolve_model(folder), **({"with_tokenizer": False} | options.pop("load", {})))
    apply_plan(loaded.model, plan)
    return save_checkpoint(loaded.model, loaded.tokenizer, out, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_those_of_surgery_in_memory(name, tmp_path):
    plan = removing(8, (4, 8)) if name in ("qwen3_next", "qwen2_moe") else removing(8, (3, 4), (6, 7))
    tiny_model(name).save_pretrained(tmp_path / "model")
    try:
        memory = in_memory(tmp_path / "model", plan, tmp_path / "memory")
    except ArchitectureError as error:
        with pytest.raises(ArchitectureError, match=str(error)[:20]):
            stream_plan(resolve_model(tmp_path / "model"), plan, tmp_path / "streamed", with_tokenizer=False)
        assert not list((tmp_path / "streamed").glob("*.safetensors"))
        return
    streamed = stream_plan(resolve_model(tmp_path / "model"), plan, tmp_path / "streamed", with_tokenizer=False)
    assert model_files(streamed) == model_files(memory)


def test_shards_and_index_are_the_same_too(tmp_path):
    folder = tiny_folder(tmp_path / "model", shards=True, num_hidden_layers=12)
    plan = removing(12, (1, 2), hidden_size=16)
    load = {"with_tokenizer": True}
    memory = in_memory(folder, plan, tmp_path / "memory", load=load, max_shard_size="10KB")
    streamed = stream_plan(resolve_model(folder), plan, tmp_path / "streamed", max_shard_size="10KB")
    assert len(list(streamed.glob("model-*.safetensors"))) > 2
    assert model_files(streamed) == model_files(memory)


def test_names_of_older_files_and_second_copies_of_tied_weights_are_understood(tmp_path):
    model = tiny_model("llama_tied_bias")
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, metadata={"format": "pt"})
    out = stream_plan(resolve_model(tmp_path / "model"), removing(8, (2, 5)), tmp_path / "out", with_tokenizer=False)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    apply_plan(model, removing(8, (2, 5)))
    torch.testing.assert_close(loaded(tiny_tokens()).logits, model(tiny_tokens()).logits, rtol=0, atol=0)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_stray_dtypes_become_the_models(tmp_path):
    folder = tiny_folder(tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan = removing(3, (1, 2), hidden_size=16)
    memory = in_memory(folder, plan, tmp_path / "memory", load={"with_tokenizer": True})
    streamed = stream_plan(resolve_model(folder), plan, tmp_path / "streamed")
    assert model_files(streamed) == model_files(memory)


def test_removing_nothing_keeps_every_tensor(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    out = stream_plan(resolve_model(folder), removing(3, hidden_size=16), tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refusals_write_nothing(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    source = resolve_model(folder)
    with pytest.raises(PlanError, match="must be trained"):
        stream_plan(source, replacing(3, 0, 2, hidden_size=16), tmp_path / "out")
    with pytest.raises(PlanError, match="5 layers"):
        stream_plan(source, removing(5, (1, 2), hidden_size=16), tmp_path / "out")
    with pytest.raises(OutputError, match="the model that is read"):
        stream_plan(source, removing(3, (1, 2), hidden_size=16), folder)
    assert not (tmp_path / "out").exists()


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    from llm_streamline.export import shards

    alive, most = [0], [0]
    original = shards._pieces

    def counting(tensor):
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        yield from original(tensor)
        alive[0] -= 1

    monkeypatch.setattr(shards, "_pieces", counting)
    folder = tiny_folder(tmp_path / "model")
    stream_plan(resolve_model(folder), removing(3, (0, 1), hidden_size=16), tmp_path / "out")
    assert most[0] == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
