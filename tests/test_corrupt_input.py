"""Each way in which a model's files can be corrupt, through the command line: one sentence, exit code 2, no output."""

import json
import struct
import sys

import pytest
from folders import edit_json, join_safetensors, split_safetensors, tiny_folder
from plans import facts

from llm_streamline.cli import main
from llm_streamline.plan import Plan, Remove
from llm_streamline.sources.weights import INDEX_FILE, SINGLE_FILE


def truncated(folder):
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-100])


def absurd_header(folder):
    path = folder / SINGLE_FILE
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def wrong_shape(folder):
    header, data = split_safetensors(folder / SINGLE_FILE)
    entry = header["model.layers.1.mlp.up_proj.weight"]
    entry["shape"] = entry["shape"][::-1]
    join_safetensors(folder / SINGLE_FILE, header, data)


def link_out(folder):
    (folder / SINGLE_FILE).rename(folder.parent / "elsewhere.safetensors")
    (folder / SINGLE_FILE).symlink_to(folder.parent / "elsewhere.safetensors")


def one_layer_more(folder):
    edit_json(folder / "config.json", num_hidden_layers=4)


def one_layer_fewer(folder):
    edit_json(folder / "config.json", num_hidden_layers=2)


def shard_missing(folder):
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def index_names(name):
    def change(folder):
        index = json.loads((folder / INDEX_FILE).read_text())
        index["weight_map"]["model.norm.weight"] = name
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return change


SINGLE = {
    "truncated safetensors": (truncated, "truncated"),
    "header of absurd length": (absurd_header, "truncated or not safetensors"),
    "tensor of a wrong shape": (wrong_shape, "mlp.up_proj.weight of"),
    "symlink that leaves the folder": (link_out, "link to a file outside"),
    "config with a layer more": (one_layer_more, "says 4 layers, its weights hold 3"),
    "config with a layer fewer": (one_layer_fewer, "layers that its config does not have"),
}
SHARDS = {
    "shard missing": (shard_missing, "missing from"),
    "index naming a missing file": (index_names("model-9.safetensors"), "missing from"),
    "name that leaves the folder": (index_names("../elsewhere.safetensors"), "refusing to follow it"),
}


def refused(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["llm-streamline", "-q", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        main()
    captured = capfd.readouterr()
    assert leaving.value.code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert "Error: " in lines[-1]
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
@pytest.mark.parametrize("damage", [*SINGLE, *SHARDS])
def test_corrupt_folders(damage, streamed, tmp_path, monkeypatch, capfd):
    folder = tiny_folder(tmp_path / "model", shards=damage in SHARDS)
    change, reason = (SINGLE | SHARDS)[damage]
    change(folder)
    plan = tmp_path / "plan.json"
    plan.write_text(Plan(model=facts(3, hidden_size=16), edits=(Remove(start=1, stop=2),)).to_json())
    before = sorted(tmp_path.rglob("*"))
    if streamed:
        slices = (
            tmp_path / "slices.yaml"
        )  # a plan would be refused for its fingerprint before the weights are looked at
        slices.write_text("slices:\n- sources:\n  - {model: m, layer_range: [0, 2]}\n")
        before.append(slices)
        message = refused(monkeypatch, capfd, "apply", slices, folder, "-o", tmp_path / "out", "--stream")
    else:
        text = tmp_path / "text.txt"
        text.write_text("A short text about nothing in particular. " * 200)
        before.append(text)
        message = refused(
            monkeypatch, capfd, "analyze", folder, "-o", tmp_path / "out", "--text", text, "--seq-len", 16
        )
    assert reason in message
    assert sorted(tmp_path.rglob("*")) == sorted(before)


def test_truncated_gguf(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gguf")
    from folders import tiny_llama
    from gguf_files import SETTINGS, write_gguf

    monkeypatch.setenv("LLM_STREAMLINE_CACHE", str(tmp_path / "cache"))
    path, plan = tmp_path / "model.gguf", tmp_path / "plan.json"
    write_gguf(path, tiny_llama(**SETTINGS))
    raw = path.read_bytes()
    plan.write_text(Plan(model=facts(3), edits=(Remove(start=1, stop=2),)).to_json())
    before = sorted(tmp_path.rglob("*"))
    for keep in (3, 20, 2000, len(raw) - 64):
        path.write_bytes(raw[:keep])
        for command in (
            ["analyze", path, "-o", tmp_path / "out"],
            ["apply", plan, path, "-o", tmp_path / "out", "--stream"],
            ["export", path, "--plan", plan, "-o", tmp_path / "out.gguf"],
        ):
            assert "truncated" in refused(monkeypatch, capfd, *command) or keep == 3
    assert sorted(tmp_path.rglob("*")) == before
