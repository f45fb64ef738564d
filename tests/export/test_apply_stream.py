"""`apply --stream` and slices on the command line: whole runs on files, proven, with the memory they take measured."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import byte_tokenizer, edit_json, tiny_folder
from safetensors.torch import load_file, save_file
from tiny import TINY_ROWS, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from export_plans import removing
from export_tokenizers import merging_tokenizer

from llm_streamline import cli, proof
from llm_streamline.errors import ProofError, SourceError
from llm_streamline.export.reference import cut_original
from llm_streamline.export.stream import stream_plan
from llm_streamline.output import is_complete
from llm_streamline.pipeline import apply_plan, plan_from_slices
from llm_streamline.plan import Plan, Remove
from llm_streamline.sources import load_model, load_skeleton, resolve_model
from llm_streamline.stages.original import facts_of, model_facts
from llm_streamline.surgery import keep_layers


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model", shards=True, num_hidden_layers=6)


def plan_for(folder, *spans) -> Plan:
    source = resolve_model(folder)
    edits = tuple(Remove(start=start, stop=stop) for start, stop in spans)
    return Plan(model=facts_of(source, load_skeleton(source)), edits=edits)


def call(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["llm-streamline", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def weights_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_facts_without_weights_are_those_with(folder, tmp_path):
    tied = tiny_folder(tmp_path / "tied", tie_word_embeddings=True)
    for one in (folder, tied):
        source = resolve_model(one)
        assert facts_of(source, load_skeleton(source)) == model_facts(load_model(source))


@pytest.mark.parametrize("name", TINY_ROWS)
def test_the_original_with_its_layers_on_disk_is_the_truth(name, tmp_path):
    """The bypassed original, read layer by layer, equals surgery in memory, for every family."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    with cut_original(resolve_model(tmp_path / "model"), removing(8, (2, 4)), torch.float32, tmp_path) as reference:
        assert all(parameter.is_meta for layer in _layers(reference) for parameter in layer.parameters())
        with torch.no_grad():
            found = reference(tiny_tokens(), use_cache=False).logits
    keep_layers(model, [0, 1, 4, 5, 6, 7])
    with torch.no_grad():
        torch.testing.assert_close(found, model(tiny_tokens(), use_cache=False).logits, atol=1e-5, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def _layers(model):
    from llm_streamline.arch import get_layers

    return get_layers(model)


def test_streamed_equals_in_memory_and_is_proven(folder, tmp_path):
    plan = plan_for(folder, (1, 2), (3, 5))
    memory = apply_plan(plan, str(folder), tmp_path / "memory")
    streamed = apply_plan(plan, str(folder), tmp_path / "streamed", stream=True)
    before, after = weights_of(memory.out), weights_of(streamed.out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert streamed.proof.ok
    assert {check.name for check in streamed.proof.checks} == {check.name for check in memory.proof.checks}
    assert streamed.preview == replace(memory.preview, saving_seconds=None)  # nothing is timed on the way
    assert is_complete(streamed.out)
    manifest = json.loads((streamed.out / "streamline" / "manifest.json").read_text())
    assert manifest["streamed"] is True
    assert not [path for path in streamed.out.iterdir() if path.name.startswith(".")]


def test_the_dtype_may_be_chosen(folder, tmp_path):
    out = stream_plan(resolve_model(folder), plan_for(folder, (1, 2)), tmp_path / "out", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_hub_snapshot_of_links_is_cut(folder, tmp_path):
    """As the Hub's cache lays it out: every file of the snapshot is a link into the blobs beside it."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "c0ffee", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    out = stream_plan(resolve_model(snapshot), plan_for(snapshot, (1, 2)), tmp_path / "out")
    expected = stream_plan(resolve_model(folder), plan_for(folder, (1, 2)), tmp_path / "expected")
    before, after = weights_of(expected), weights_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(path.is_symlink() for path in out.iterdir())


def test_shards_of_an_earlier_larger_result_are_gone(folder, tmp_path):
    source = resolve_model(folder)
    out = stream_plan(source, plan_for(folder, (1, 2)), tmp_path / "out", max_shard_size="8KB")
    many = {path.name for path in out.glob("*.safetensors")}
    stream_plan(source, plan_for(folder, (1, 5)), out, max_shard_size="16KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {path.name for path in out.glob("*.safetensors")} == set(index["weight_map"].values())
    assert len(many) > len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in weights_of(out).values())
    stream_plan(source, plan_for(folder, (1, 5)), out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_result_that_does_not_fit_is_proven_from_disk(folder, tmp_path, monkeypatch):
    from llm_streamline import without_weights

    monkeypatch.setattr(without_weights, "fits_in_memory", lambda num_bytes: False)
    outcome = apply_plan(plan_for(folder, (1, 3)), str(folder), tmp_path / "out", stream=True)
    assert outcome.proof.ok
    request = {check.name: check for check in outcome.proof.checks}
    assert request["cache"].value <= request["cache"].tolerance


def test_the_proof_finds_a_layer_that_is_wrong(folder, tmp_path, monkeypatch):
    """Two layers exchanged in the written files: every key is there, only the function is another one."""
    from llm_streamline.export import stream

    right = stream._renamed

    def exchanged(*arguments):
        names = right(*arguments)
        other = {new: (new.replace(".1.", ".2.") if ".1." in new else new.replace(".2.", ".1.")) for new in names}
        return {new: names[other[new]] if "layers" in new else old for new, old in names.items()}

    monkeypatch.setattr(stream, "_renamed", exchanged)
    with pytest.raises(ProofError, match="logits"):
        apply_plan(plan_for(folder, (0, 1)), str(folder), tmp_path / "out", stream=True)
    assert not is_complete(tmp_path / "out")


def test_a_gguf_file_can_be_streamed(folder, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from llm_streamline.export.gguf import export_gguf

    monkeypatch.setenv("LLM_STREAMLINE_CACHE", str(tmp_path / "cache"))
    wide = tiny_folder(tmp_path / "wide", hidden_size=32, intermediate_size=64, num_hidden_layers=4)
    merging_tokenizer().save_pretrained(wide)
    export_gguf(wide, tmp_path / "model.gguf", "Q8_0")
    plan = plan_for(tmp_path / "model.gguf", (1, 2))
    outcome = apply_plan(plan, str(tmp_path / "model.gguf"), tmp_path / "out", stream=True)
    assert outcome.proof.ok
    config = json.loads((outcome.out / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert "quantization_config" not in config


def test_the_command_line_streams_plans_and_slices(folder, tmp_path, monkeypatch, capfd):
    slices = tmp_path / "slices.yaml"
    part = "  - sources:\n    - model: org/any\n      layer_range: [{}, {}]\n"
    slices.write_text(f"slices:\n{part.format(0, 2)}{part.format(4, 6)}merge_method: passthrough\ndtype: bfloat16\n")
    plan = tmp_path / "plan.json"
    code, out, _ = call(monkeypatch, capfd, "plan", folder, "--from-slices", slices, "-o", plan, "--json")
    assert code == 0
    assert [(e["start"], e["stop"]) for e in json.loads(out)["plan"]["edits"]] == [(2, 4)]
    assert Plan.load(plan).selection.target == "the layers that slices.yaml keeps"
    code, out, err = call(monkeypatch, capfd, "apply", slices, folder, "-o", tmp_path / "out", "--stream")
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    back = tmp_path / "back.yaml"
    assert call(monkeypatch, capfd, "export", plan, "--slices", "-o", back)[0] == 0
    assert plan_from_slices(back, str(folder))[0].edits == Plan.load(plan).edits


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "{model}", "--from-slices", "{slices}", "--layers", "2"], "leave out --layers"),
        (["plan", "{model}", "--from-slices", "none.yaml"], "cannot be read as mergekit's slices"),
        (["apply", "{slices}", "{model}", "-o", "{out}", "--stream", "--device", "cuda"], "needs no device"),
        (["apply", "{replacing}", "{model}", "-o", "{out}", "--stream"], "must be trained"),
        (["apply", "{other}", "{model}", "-o", "{out}", "--stream"], "this plan was made for"),
    ],
)
def test_refusals_are_one_sentence_and_write_nothing(arguments, sentence, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    names = {"model": folder, "slices": tmp_path / "s.yaml", "out": tmp_path / "out", "other": tmp_path / "other.json"}
    names["replacing"] = tmp_path / "replacing.json"
    names["slices"].write_text("slices:\n- sources:\n  - {model: m, layer_range: [0, 4]}\n")
    names["other"].write_text(removing(6, (1, 2), hidden_size=16).to_json())
    plan = plan_for(folder, (1, 3)).model_dump(mode="json")
    plan["edits"] = [{"kind": "replace", "start": 1, "stop": 3, "network": {"kind": "layer"}, "templates": [1]}]
    names["replacing"].write_text(json.dumps(plan))
    before = sorted(tmp_path.iterdir())
    code, _, err = call(monkeypatch, capfd, *(argument.format(**names) for argument in arguments))
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["wider", "missing", "shape"])
def test_weights_that_do_not_fit_the_config_are_refused_before_anything_is_written(damage, folder, tmp_path):
    plan = plan_for(folder, (1, 2))
    victim = next(
        path
        for path in sorted(folder.glob("*.safetensors"))
        if "mlp.up_proj" in path.read_bytes()[:4000].decode("latin-1")
    )
    tensors = load_file(victim)
    name = next(name for name in tensors if "mlp.up_proj" in name)
    if damage == "wider":
        edit_json(folder / "config.json", intermediate_size=40)
    elif damage == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors[name + ".lost"] = tensors.pop(name)
        edit_index(folder, name, name + ".lost")
    save_file(tensors, victim, {"format": "pt"})
    with pytest.raises(SourceError, match=r"has the shape|lacks 1 of the weights"):
        apply_refitted(plan, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def apply_refitted(plan, folder, out):
    """Apply a plan as if it had been made for the folder as it is now."""
    source = resolve_model(folder)
    apply_plan(
        plan.model_copy(update={"model": facts_of(source, load_skeleton(source))}), str(folder), out, stream=True
    )


def edit_index(folder, old, new):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][new] = index["weight_map"].pop(old)
    path.write_text(json.dumps(index))


def test_warnings_of_runtimes_that_count_reach_the_user(tmp_path, caplog, monkeypatch):
    model = tiny_model(
        "gemma3_text",
        vocab_size=272,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
        num_hidden_layers=12,
    )
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    slices = tmp_path / "s.yaml"
    slices.write_text("slices:\n- sources:\n  - {model: m, layer_range: [1, 12]}\n")
    made, _ = plan_from_slices(slices, str(tmp_path / "model"))
    assert "layer_types of this gemma3_text is no longer periodic" in made.selection.warnings[0]
    assert "llama.cpp" in made.selection.warnings[0]
    monkeypatch.setattr(proof, "_run_child", lambda folder: "not run here")
    with pytest.raises(ProofError):
        apply_plan(made, str(tmp_path / "model"), tmp_path / "out", stream=True)
    assert made.selection.warnings[0] in caplog.text


_MEASURED = """
import sys
from llm_streamline.pipeline import apply_plan
from llm_streamline.runtime import peak_memory, reset_peak_memory
from llm_streamline.sources import load_skeleton, resolve_model
from llm_streamline.stages.original import facts_of
from llm_streamline.plan import Plan, Remove
from llm_streamline import proof
proof._run_child = lambda folder: "not measured here"  # a process of its own
proof.Proof.raise_if_failed = lambda self, accept_degenerate_text=False: None
folder, warm, out = sys.argv[1:]
def plan(of):
    source = resolve_model(of)
    return Plan(model=facts_of(source, load_skeleton(source)), edits=(Remove(start=1, stop=2),))
apply_plan(plan(warm), warm, out + "-warm", stream=True)  # imports and what libraries keep
wanted = plan(folder)
assert reset_peak_memory()
before = peak_memory().host_bytes
apply_plan(wanted, folder, out, stream=True)
print("EXTRA", peak_memory().host_bytes - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is reset through /proc")
def test_peak_memory_is_a_share_of_the_source(tmp_path):
    """A source of 100 MB in 24 layers: one layer and the embeddings are in memory, not the model, let alone two."""
    big = tiny_folder(
        tmp_path / "big", hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_hidden_layers=24,
        num_key_value_heads=4, shards=True, max_shard_size="20MB",
    )  # fmt: skip
    warm = tiny_folder(tmp_path / "warm")
    size = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    assert size > 90e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(big), str(warm), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    extra = int(re.search(r"EXTRA (\d+)", done.stdout)[1])
    assert extra < 0.35 * size, f"{extra / 1e6:.0f} MB for a source of {size / 1e6:.0f} MB"
