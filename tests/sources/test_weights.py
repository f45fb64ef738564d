"""Headers that lie: each gives one sentence, quickly, and nothing is ever opened outside the folder."""

import json
import struct

import pytest
from folders import edit_json, join_safetensors, split_safetensors, tiny_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_streamline.errors import SourceError, StreamlineError
from llm_streamline.sources import load_model, resolve_model
from llm_streamline.sources.weights import check_inside, read_header, read_weights

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    return tiny_folder(tmp_path / "shards", shards=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("scratch") / "model")


def refusal(folder) -> str:
    with pytest.raises(SourceError) as caught:
        read_weights(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_headers_agree_with_the_library(folder, shards):
    from safetensors import safe_open

    weights = read_weights(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
            name: header.shape for name, header in weights.tensors.items()
        }
    assert weights.num_layers == 3
    assert read_weights(shards).tensors == weights.tensors
    assert read_weights(shards).num_elements == weights.num_elements


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refusal(folder)


def test_bytes_too_many(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "too long" in refusal(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 0])
def test_an_absurd_header_length(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert str(path) in refusal(folder)


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"nonsense", b"[" * 10**6, b"\xff\xfe", b'{"a": 1}', b'{"a":{},"a":{}}', b"{}"]
)
def test_a_header_that_is_none(folder, header):
    join_safetensors(folder / "model.safetensors", header, b"")
    refusal(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F33"},
        {"dtype": ["F32"]},
        {"shape": [10**9, 10**9]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": "16"},
        {"shape": [2**62] * 60},
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [4, 0]},
        {"data_offsets": [0]},
        {"data_offsets": None},
    ],
)
def test_a_tensor_described_wrongly(folder, entry):
    path = folder / "model.safetensors"
    header, data = split_safetensors(path)
    header["model.norm.weight"] |= entry
    join_safetensors(path, header, data)
    assert "model.norm.weight" in refusal(folder)


def test_tensors_that_overlap(folder):
    path = folder / "model.safetensors"
    header, data = split_safetensors(path)
    norms = [name for name in header if name.endswith("layernorm.weight")]
    header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
    join_safetensors(path, header, data)
    assert "overlaps" in refusal(folder)


def test_a_shard_is_missing(shards):
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert victim.name in refusal(shards)


def test_shards_without_index(shards):
    (shards / INDEX).unlink()
    assert "shards but no" in refusal(shards)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "C:\\x", "nul\0l", "x" * 999],
)
def test_an_index_that_leaves_the_folder(shards, name):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (shards / INDEX).write_text(json.dumps(index))
    (shards.parent / "secret.safetensors").write_bytes(b"secret")
    message = refusal(shards)
    assert "refusing" in message or "cannot be opened" in message or "missing" in message


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], 5, {"model.norm.weight": 3}, {"model.norm.weight": "config.json"}]
)
def test_an_index_that_is_none(shards, weight_map):
    edit_json(shards / INDEX, weight_map=weight_map)
    refusal(shards)


def test_an_index_that_names_the_wrong_shard(shards):
    index = json.loads((shards / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    held = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(name for name in names if name != held)
    (shards / INDEX).write_text(json.dumps(index))
    assert "says tensor model.norm.weight is in" in refusal(shards)


def test_a_tensor_in_two_shards(shards):
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    assert "is in both" in refusal(shards)


def test_a_link_that_leaves_the_folder(tmp_path, folder):
    path = folder / "model.safetensors"
    outside = tmp_path / "elsewhere.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    assert "link to a file outside" in refusal(folder)
    path.unlink()
    path.symlink_to("model.safetensors")  # a loop
    refusal(folder)


def test_a_link_within_the_folder_is_followed(folder):
    path = folder / "model.safetensors"
    path.rename(folder / "weights.safetensors")
    path.symlink_to("weights.safetensors")
    assert read_weights(folder).num_layers == 3


def test_a_folder_of_other_things(tmp_path):
    for name, reason in (("x.gguf", "name the file itself"), ("model.pth", "pickled"), ("adapter_config.json", "PEFT")):
        place = tmp_path / name.replace(".", "_")
        place.mkdir()
        (place / name).write_bytes(b"")
        assert reason in refusal(place)


def test_check_inside_accepts_plain_names(folder):
    assert check_inside(folder, "config.json", "test") == folder / "config.json"


# --- whatever the header says


def _json_values():
    numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
    return numbers | st.text(max_size=8) | st.lists(numbers, max_size=3)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_to_a_header_is_refused_or_harmless(scratch, data):
    values = _json_values()
    path = scratch / "mutated.safetensors"
    header, body = split_safetensors(scratch / "model.safetensors")
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "*", "name"]))
        value = data.draw(values)
        if key == "*":
            header[name] = value
        elif key == "name":
            header[str(value)] = header.pop(name)
        elif isinstance(header[name], dict):
            header[name][key] = value
    join_safetensors(path, header, body)
    try:
        tensors = read_header(path)
    except StreamlineError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert sum(t.num_elements for t in tensors.values()) * 4 <= len(body)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 4000), value=st.binary(min_size=1, max_size=12), cut=st.none() | st.integers(0, 40_000))
def test_any_change_to_bytes_is_refused_or_harmless(scratch, position, value, cut):
    raw = (scratch / "model.safetensors").read_bytes()
    path = scratch / "mutated.safetensors"
    path.write_bytes((raw[:position] + value + raw[position + len(value) :])[:cut])
    try:
        read_header(path)
    except StreamlineError as error:
        assert "\n" not in str(error).replace(repr(str(error)), "")  # noqa: PT017


_CONFIG_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_CONFIG_KEYS += ("vocab_size", "rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings", "pad_token_id")
_CONFIG_KEYS += ("dtype", "architectures", "layer_types", "head_dim", "max_position_embeddings", "attention_bias")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(_CONFIG_KEYS), value=_json_values() | st.integers(-3, 40) | st.sampled_from(["silu", {}]))
def test_any_change_to_a_config_is_refused_or_loads(scratch, key, value):
    config = scratch / "config.json"
    kept = config.read_text()
    try:
        edit_json(config, **{key: value})
        load_model(resolve_model(scratch), with_tokenizer=False)
    except StreamlineError as error:
        assert str(error)  # noqa: PT017
    finally:
        config.write_text(kept)
