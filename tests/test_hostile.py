"""Whatever the files say: one sentence, exit code 2, no hang, and no file outside the output folder; or it just works.

Files of a tiny model are changed at random (hypothesis): safetensors headers and bytes, the index, config.json, GGUF
headers. `CASES` cases in all; each goes through what a command would do with the file before and while it writes.
"""

import json
import struct
from datetime import timedelta
from pathlib import Path

import pytest
from folders import join_safetensors, split_safetensors, tiny_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_streamline.errors import StreamlineError
from llm_streamline.export.stream import stream_plan
from llm_streamline.plan import Plan, Remove
from llm_streamline.sources import load_config, load_skeleton, resolve_model
from llm_streamline.sources.weights import INDEX_FILE, SINGLE_FILE, read_weights
from llm_streamline.stages.original import facts_of
from llm_streamline.surgery import apply_plan

EXAMPLES = {"header": 600, "bytes": 350, "index": 250, "config": 250, "gguf": 500, "cut": 120, "stream": 130}
CASES = sum(EXAMPLES.values())
LONGEST = timedelta(seconds=60)  # of one case, on a busy machine; they take milliseconds


def cases(name):
    return settings(
        max_examples=EXAMPLES[name],
        deadline=LONGEST,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
        database=None,
        derandomize=True,  # the same cases every time: a failure here is one that anybody can repeat
    )


def test_there_are_enough_cases():
    assert CASES >= 2000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model in one file, the same in shards, and something that is nobody's business."""
    root = tmp_path_factory.mktemp("hostile")
    tiny_folder(root / "single")
    tiny_folder(root / "shards", shards=True)
    (root / "secret.safetensors").write_bytes((root / "single" / SINGLE_FILE).read_bytes())
    return root


def everything(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def outcome(action):
    """What the action returns, or None when it is refused as it should be."""
    try:
        return action()
    except StreamlineError as refusal:
        assert refusal.exit_code == 2, refusal  # noqa: PT017
        assert str(refusal)  # noqa: PT017
        assert "\n" not in str(refusal)  # noqa: PT017
        return None


SPECIAL = (0, 1, -1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
numbers = st.one_of(st.sampled_from(SPECIAL), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none())
names = st.sampled_from(
    ["../secret.safetensors", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "\0", "x" * 300, "\udcff"]
)
scalars = numbers | names | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)


@cases("header")
@given(data=st.data())
def test_any_safetensors_header(place, data):
    folder = place / "single"
    original = (folder / SINGLE_FILE).read_bytes()
    header, body = split_safetensors(folder / SINGLE_FILE)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(header)))
        what = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "number", "entry", "name", "drop"]))
        if what == "entry":
            header[name] = data.draw(values)
        elif what == "name":
            header[data.draw(names | st.text(max_size=12))] = header.pop(name)
        elif what == "drop":
            del header[name]
        elif isinstance(header[name], dict) and name != "__metadata__":
            if what == "number":
                key = data.draw(st.sampled_from(["shape", "data_offsets"]))
                if isinstance(header[name].get(key), list) and header[name][key]:
                    header[name][key][0] = data.draw(numbers)
            else:
                header[name][what] = data.draw(values)
    length = data.draw(st.none() | st.integers(0, 2**64 - 1))
    try:
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
        weights = outcome(lambda: read_weights(folder))
        assert weights is None or sum(t.num_elements for t in weights.tensors.values()) * 4 <= 2 * len(body)
    finally:
        (folder / SINGLE_FILE).write_bytes(original)


@cases("bytes")
@given(
    position=st.integers(0, 6000),
    value=st.binary(min_size=1, max_size=16) | st.sampled_from([struct.pack("<Q", n % 2**64) for n in SPECIAL]),
    cut=st.none() | st.integers(0, 60_000),
    more=st.binary(max_size=3),
)
def test_any_bytes_of_a_safetensors_file(place, position, value, cut, more):
    folder = place / "single"
    original = (folder / SINGLE_FILE).read_bytes()
    try:
        changed = original[:position] + value + original[position + len(value) :]
        (folder / SINGLE_FILE).write_bytes(changed[:cut] + more)
        outcome(lambda: read_weights(folder))
    finally:
        (folder / SINGLE_FILE).write_bytes(original)


@cases("index")
@given(data=st.data())
def test_any_index(place, data):
    folder = place / "shards"
    original = (folder / INDEX_FILE).read_bytes()
    index = json.loads(original)
    files = sorted(set(index["weight_map"].values()))
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(index.get("weight_map") or ["?"])))
        what = data.draw(st.sampled_from(["file", "other", "drop", "new", "map", "metadata"]))
        if what in ("map", "metadata"):
            index["weight_map" if what == "map" else what] = data.draw(values)
        if not isinstance(index.get("weight_map"), dict):
            break
        if what == "file":
            index["weight_map"][name] = data.draw(values)
        elif what == "other":
            index["weight_map"][name] = data.draw(st.sampled_from(files))
        elif what == "drop":
            index["weight_map"].pop(name, None)
        elif what == "new":
            index["weight_map"][data.draw(st.text(max_size=10))] = data.draw(names | st.sampled_from(files))
    try:
        (folder / INDEX_FILE).write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
        weights = outcome(lambda: read_weights(folder))
        assert weights is None or all(path.parent == folder for path in weights.files)
    finally:
        (folder / INDEX_FILE).write_bytes(original)


KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
KEYS += ("vocab_size", "rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings", "pad_token_id", "dtype")
KEYS += ("architectures", "layer_types", "head_dim", "max_position_embeddings", "attention_bias", "model_type")
KEYS += (
    "auto_map",
    "quantization_config",
    "text_config",
    "per_layer_config",
    "streamline_mlp_layers",
    "sliding_window",
)
KEYS += (
    "_name_or_path",
    "sliding_window",
    "torch_dtype",
    "rope_scaling",
    "mlp_only_layers",
    "no_rope_layers",
    "is_encoder_decoder",
)
families = st.sampled_from(["llama", "qwen3", "gemma3_text", "gpt2", "mamba", "bert", "t5", "gemma3n_text", "x"])


@cases("config")
@given(
    changes=st.dictionaries(
        st.sampled_from(KEYS), values | st.integers(-3, 40) | families | st.just({"0": {"kind": "ffn"}}), max_size=3
    ),
    raw=st.none() | st.binary(max_size=40),
)
def test_any_config(place, changes, raw):
    """Read, built without weights, and cut: everything that a config decides before a tensor is read."""
    path = place / "single" / "config.json"
    original = path.read_bytes()
    try:
        content = json.dumps(json.loads(original) | changes).encode("utf-8", "surrogatepass")
        path.write_bytes(content if raw is None else raw + content[len(raw) :])
        outcome(lambda: cut_without_weights(place / "single"))
    finally:
        path.write_bytes(original)


def cut_without_weights(folder: Path):
    source = resolve_model(folder)
    skeleton = load_skeleton(source)
    load_config(source)
    facts = facts_of(source, skeleton)
    apply_plan(skeleton, Plan(model=facts, edits=(Remove(start=facts.num_layers - 1, stop=facts.num_layers),)))


@cases("stream")
@given(data=st.data())
def test_whatever_is_streamed_stays_in_its_folder(place, data):
    """Names of tensors, shapes and config changed together, then cut on files: all else is as it was."""
    folder, out = place / "single", place / "out"
    header, body = split_safetensors(folder / SINGLE_FILE)
    kept = {name: (folder / name).read_bytes() for name in (SINGLE_FILE, "config.json")}
    plan = plan_for(folder)
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(name for name in header if name != "__metadata__")))
        new = data.draw(names | st.sampled_from(["model.layers.9.x", "model.layers.0.mlp.up_proj.weight", "a.1.b"]))
        if data.draw(st.booleans()):
            header[new] = header.pop(name)
        else:
            header[name]["shape"] = header[name]["shape"][::-1]
    changes = data.draw(st.dictionaries(st.sampled_from(KEYS), values | st.integers(-3, 40), max_size=1))
    try:
        join_safetensors(folder / SINGLE_FILE, json.dumps(header).encode("utf-8", "surrogatepass"), body)
        config = json.loads(kept["config.json"]) | changes
        (folder / "config.json").write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))
        before = everything(place)
        outcome(lambda: stream_plan(resolve_model(folder), plan, out, with_tokenizer=False))
        after = everything(place)
        assert {name: after.get(name) for name in before} == before
        assert all(name.startswith("out/") for name in after.keys() - before.keys())
    finally:
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        remove_tree(out)


def plan_for(folder: Path) -> Plan:
    source = resolve_model(folder)
    return Plan(model=facts_of(source, load_skeleton(source)), edits=(Remove(start=1, stop=2),))


def remove_tree(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


# --- GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    from folders import tiny_llama
    from gguf_files import SETTINGS, write_gguf

    path = tmp_path_factory.mktemp("hostile-gguf") / "model.gguf"
    write_gguf(path, tiny_llama(**SETTINGS))
    return path


gguf_changes = st.lists(
    st.tuples(
        st.integers(4, 9000),
        st.one_of(
            st.binary(min_size=1, max_size=10),
            st.sampled_from([struct.pack("<Q", n % 2**64) for n in SPECIAL]),
            st.sampled_from([struct.pack("<I", n) for n in (0, 1, 8, 9, 12, 13, 255, 2**31, 2**32 - 1)]),
        ),
    ),
    min_size=1,
    max_size=3,
)


def changed_gguf(original: bytes, changes, cut) -> bytes:
    for position, value in changes:
        original = original[:position] + value + original[position + len(value) :]
    return original[:cut]


@cases("gguf")
@given(changes=gguf_changes, cut=st.none() | st.integers(0, 100_000))
def test_any_gguf_header(gguf_file, changes, cut):
    from llm_streamline.sources.gguf import read_gguf_header

    path = gguf_file.with_name("changed.gguf")
    path.write_bytes(changed_gguf(gguf_file.read_bytes(), changes, cut))
    header = outcome(lambda: read_gguf_header(path))
    assert header is None or header.tensor_types


@cases("cut")
@given(changes=gguf_changes)
def test_whatever_gguf_is_cut_gives_one_sound_file_or_none(gguf_file, changes):
    from plans import facts

    from llm_streamline.export.gguf_cut import cut_gguf
    from llm_streamline.sources.gguf import read_gguf_header

    path, out = gguf_file.with_name("changed.gguf"), gguf_file.with_name("out.gguf")
    path.write_bytes(changed_gguf(gguf_file.read_bytes(), changes, None))
    before = everything(gguf_file.parent)
    plan = Plan(model=facts(3), edits=(Remove(start=1, stop=2),))
    try:
        done = outcome(lambda: cut_gguf(path, out, plan))
        after = everything(gguf_file.parent)
        assert after.keys() - before.keys() == ({"out.gguf"} if done else set())
        if done:
            read_gguf_header(out)
    finally:
        out.unlink(missing_ok=True)
