"""GGUF files cut as bytes: truths from the gguf package's own reader and writer."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
gguf = pytest.importorskip("gguf")
from export_plans import removing, replacing

from llm_streamline.errors import ArchitectureError, OutputError, PlanError, SourceError
from llm_streamline.export.gguf_cut import cut_gguf

KIND = gguf.GGMLQuantizationType.Q8_0


def write(path: Path, arch: str = "llama", num_layers: int = 6, **metadata) -> Path:
    """A file with one quantised matrix and one norm a layer, and metadata given as key with __ for a dot."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(num_layers)
    writer.add_embedding_length(32)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(num_layers)])  # as long, but not a layer's
    for key, value in metadata.items():
        key = f"{arch}.{key.replace('__', '.')}"
        {bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}[type(value)](key, value)
    random = np.random.default_rng(0)
    writer.add_tensor(
        "token_embd.weight", gguf.quantize(random.standard_normal((5, 32), np.float32), KIND), raw_dtype=KIND
    )
    for layer in range(num_layers):
        matrix = gguf.quantize(random.standard_normal((4, 64), np.float32), KIND)
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", matrix, raw_dtype=KIND)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", random.standard_normal(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return metadata, {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader.tensors}


def test_layers_leave_and_the_others_keep_their_bytes(tmp_path):
    source = write(tmp_path / "in.gguf", attention__head_count=4, feed_forward_length=[1, 2, 3, 4, 5, 6])
    exported = cut_gguf(source, tmp_path / "out.gguf", removing(6, (1, 3), (5, 6)))
    (before, old), (after, new) = read(source), read(exported.path)
    assert after["llama.block_count"] == 3
    assert after["llama.feed_forward_length"] == [1, 4, 5]
    changed = {"llama.block_count", "llama.feed_forward_length", "GGUF.tensor_count"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    expected = {"token_embd.weight": old["token_embd.weight"]}
    for place, layer in enumerate((0, 3, 4)):
        for name in ("ffn_up.weight", "attn_norm.weight"):
            expected[f"blk.{place}.{name}"] = old[f"blk.{layer}.{name}"]
    assert new == expected


def test_a_plan_that_removes_nothing_gives_the_same_file(tmp_path):
    source = write(tmp_path / "in.gguf", attention__head_count_kv=[1] * 6)
    cut_gguf(source, tmp_path / "out.gguf", removing(6))
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()


def test_lists_of_other_lengths_and_of_other_owners_stay(tmp_path):
    source = write(tmp_path / "in.gguf", rope__dimension_sections=[1, 2, 3, 4, 5, 6], other=[1, 2])
    after, _ = read(cut_gguf(source, tmp_path / "out.gguf", removing(6, (0, 1))).path)
    assert after["llama.rope.dimension_sections"] == [1, 2, 3, 4, 5, 6]
    assert after["llama.other"] == [1, 2]
    assert len(after["tokenizer.ggml.tokens"]) == 6


def test_dense_layers_that_come_first_are_counted_again(tmp_path):
    source = write(tmp_path / "in.gguf", "deepseek2", leading_dense_block_count=2)
    after, _ = read(cut_gguf(source, tmp_path / "out.gguf", removing(6, (1, 3))).path)
    assert after["deepseek2.leading_dense_block_count"] == 1


def test_the_period_of_windows_is_stated_when_it_changes(tmp_path):
    source = write(tmp_path / "in.gguf", "gemma3", 12, attention__sliding_window=8)
    whole, _ = read(cut_gguf(source, tmp_path / "whole.gguf", removing(12, (6, 12))).path)
    assert "gemma3.attention.sliding_window_pattern" not in whole
    shorter = cut_gguf(source, tmp_path / "shorter.gguf", removing(12, (0, 2), (6, 8)))
    assert read(shorter.path)[0]["gemma3.attention.sliding_window_pattern"] == 4
    again = cut_gguf(shorter.path, tmp_path / "again.gguf", removing(8, (4, 8)))
    assert read(again.path)[0]["gemma3.attention.sliding_window_pattern"] == 4
    with pytest.raises(ArchitectureError, match="follow no period"):
        cut_gguf(source, tmp_path / "no.gguf", removing(12, (0, 1)))
    with pytest.raises(ArchitectureError, match="one layer of each kind"):
        cut_gguf(source, tmp_path / "no.gguf", removing(12, (5, 6), (11, 12)))


@pytest.mark.parametrize(
    ("arch", "metadata", "spans", "message"),
    [
        ("smollm3", {}, [(0, 2)], "period 4"),
        ("llama4", {"interleave_moe_layer_step": 2}, [(0, 1)], "by counting"),
        ("qwen3next", {"full_attention_interval": 3}, [(0, 2)], "period 3"),
        ("gemma4", {"attention__shared_kv_layers": 2}, [(0, 1)], "keys and values of others"),
        ("glm4moe", {"nextn_predict_layers": 1}, [(0, 1)], "further tokens"),
        ("baichuan", {}, [(0, 1)], "by their depth"),
    ],
)
def test_what_llama_cpp_would_get_wrong_is_refused(arch, metadata, spans, message, tmp_path):
    source = write(tmp_path / "in.gguf", arch, 7, **metadata)
    with pytest.raises(ArchitectureError, match=message):
        cut_gguf(source, tmp_path / "out.gguf", removing(7, *spans))
    assert not (tmp_path / "out.gguf").exists()


def test_whole_groups_may_go(tmp_path):
    source = write(tmp_path / "in.gguf", "smollm3", 12)
    assert read(cut_gguf(source, tmp_path / "out.gguf", removing(12, (2, 6))).path)[0]["smollm3.block_count"] == 8


def test_a_model_that_llama_cpp_takes_for_another_is_refused(tmp_path):
    metadata = {"attention__head_count": 2, "attention__key_length": 8}
    source = write(tmp_path / "in.gguf", "gemma2", 46, **metadata)
    with pytest.raises(ArchitectureError, match="46 layers differently"):
        cut_gguf(source, tmp_path / "out.gguf", removing(46, (0, 2)))


def test_refusals(tmp_path):
    source = write(tmp_path / "in.gguf")
    with pytest.raises(PlanError, match=r"new weights for \[1, 3\).*export --gguf"):
        cut_gguf(source, tmp_path / "out.gguf", replacing(6, 1, 3))
    with pytest.raises(PlanError, match=r"block_count 7.*has block_count 6"):
        cut_gguf(source, tmp_path / "out.gguf", removing(7, (1, 2)))
    with pytest.raises(PlanError, match="embedding_length 16"):
        cut_gguf(source, tmp_path / "out.gguf", removing(6, (1, 2), hidden_size=16))
    (tmp_path / "short.gguf").write_bytes(source.read_bytes()[:-100])
    with pytest.raises(SourceError, match="truncated"):
        cut_gguf(tmp_path / "short.gguf", tmp_path / "out.gguf", removing(6, (1, 2)))
    with pytest.raises(OutputError, match="exists already"):
        cut_gguf(source, source, removing(6, (1, 2)))
    assert not (tmp_path / "out.gguf").exists()
