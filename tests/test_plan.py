import json

import pytest
from plans import facts, replace

from llm_streamline.errors import PlanError
from llm_streamline.plan import Candidate, Margin, Merge, Network, Plan, Remove, Replace, Selection, templates_for


def plan(*edits, num_layers=8):
    return Plan(model=facts(num_layers), edits=edits)


FULL = Plan(
    model=facts(12),
    edits=(Remove(start=1, stop=3), replace(4, 7, count=2), replace(8, 11, "linear")),
    selection=Selection(
        method="streamline",
        target="a quarter",
        convention="net",
        chosen=(4, 7),
        candidates=(Candidate(start=4, stop=7, similarity=0.9, similarity_first=0.8, similarity_rest=0.91),),
        margin=Margin(quantity="similarity", difference=0.1, low=-0.1, high=0.2, num_blocks=3),
        notes=("a note",),
    ),
)


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def refusal(path):
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert str(path) in message
    return message


def test_a_plan_survives_its_file(tmp_path):
    path = write(tmp_path / "plan.json", FULL.to_json())
    assert Plan.load(path) == FULL
    assert Plan.load(path).to_json() == FULL.to_json()


def test_sources_and_positions_follow_the_edits():
    assert FULL.layer_sources() == (0, 3, 4, 5, 7, 11)
    assert FULL.num_layers_after == 6
    # [1, 3) leaves nothing; the two layers for [4, 7) stand at 2 and 3; [8, 11) is folded into layer 7, now at 4
    assert [FULL.position_of(edit) for edit in FULL.edits] == [1, 2, 5]


def test_no_edit_means_no_change():
    assert plan().layer_sources() == tuple(range(8))
    assert "change nothing: 8 -> 8 layers" in plan().describe()


def test_the_sentence_tells_span_network_and_count():
    assert FULL.describe() == (
        "remove 2 of 12 layers [1, 3); remove 3 of 12 layers [4, 7) and put 2 decoder layers in their place; "
        "remove 3 of 12 layers [8, 11) and put a linear map (folded into the layer before) in their place"
        ": 12 -> 6 layers"
    )


@pytest.mark.parametrize(
    ("init", "count", "templates"),
    [
        ("first", 1, (2,)),
        ("last", 1, (7,)),
        ("middle", 1, (4,)),
        ("first", 2, (2, 3)),
        ("last", 2, (6, 7)),
        ("best", 1, (2,)),
    ],
)
def test_templates_lie_where_the_start_is_copied_from(init, count, templates):
    assert templates_for(Network(kind="layer", count=count, init=init), 2, 8) == templates


def test_a_linear_map_needs_no_template():
    assert templates_for(Network(kind="linear"), 2, 8) == ()


def test_the_digest_sees_the_edits_and_not_the_reasons():
    bare = FULL.model_copy(update={"selection": None})
    assert bare.digest() == FULL.digest()
    assert plan(Remove(start=1, stop=3)).digest() != plan(Remove(start=1, stop=4)).digest()
    assert plan(replace(1, 3)).digest() != plan(replace(1, 3, init="average")).digest()


def test_a_missing_plan_names_the_command(tmp_path):
    assert "llm-streamline plan" in refusal(tmp_path / "none.json")


def test_what_is_no_json_is_refused(tmp_path):
    assert "cannot be read as a plan" in refusal(write(tmp_path / "p.json", "{"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a plan" in refusal(tmp_path / "binary")
    assert "cannot be read as a plan" in refusal(tmp_path)


@pytest.mark.parametrize("data", [[], "text", 3, None, {}])
def test_json_of_another_shape_is_refused(tmp_path, data):
    refusal(write(tmp_path / "p.json", data if data != "text" else '"text"'))


MERGED = Merge(start=2, stop=5, weights=(-1.0, 1.0, 1.0), norms=(1.0, 0.0, 0.0))


def test_a_merge_leaves_one_layer_and_survives_its_file(tmp_path):
    merging = plan(MERGED, Remove(start=6, stop=7))
    assert merging.layer_sources() == (0, 1, 2, 5, 7)
    assert merging.position_of(merging.edits[1]) == 4
    assert merging.describe() == "merge 3 of 8 layers [2, 5) into one; remove 1 of 8 layers [6, 7): 8 -> 5 layers"
    assert Plan.load(write(tmp_path / "plan.json", merging.to_json())) == merging
    other = Merge(start=2, stop=5, weights=(0.0, 0.0, 1.0), norms=(1.0, 0.0, 0.0))
    assert plan(other).digest() != plan(MERGED).digest()


LAYER = {"kind": "layer"}
MERGE = {"kind": "merge", "start": 1, "stop": 3, "weights": [0.5, 0.5], "norms": [1, 0]}


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([{"kind": "remove", "start": 3, "stop": 3}], "is empty; a span is half-open"),
        ([{"kind": "remove", "start": 5, "stop": 3}], "is empty; a span is half-open"),
        ([{"kind": "remove", "start": 6, "stop": 9}], r"runs past the last layer (the model has layers 0-7)"),
        ([{"kind": "remove", "start": -1, "stop": 2}], "edits.0.remove.start"),
        (
            [{"kind": "remove", "start": 1, "stop": 4}, {"kind": "remove", "start": 3, "stop": 5}],
            "overlaps the edit before",
        ),
        ([{"kind": "remove", "start": 5, "stop": 6}, {"kind": "remove", "start": 1, "stop": 2}], "spans must ascend"),
        ([{"kind": "remove", "start": 0, "stop": 8}], "remove every layer"),
        ([{"kind": "remove", "start": 1, "stop": 2, "stpo": 3}], "Did you mean 'stop'?"),
        ([{"kind": "merge", "start": 1, "stop": 2}], "edits.0"),
        ([MERGE | {"stop": 4}], "a merge of 3 layers needs 3 factors, got 2"),
        ([MERGE | {"norms": [1]}], "norms: a merge of 2 layers needs 2 factors, got 1"),
        ([MERGE | {"weights": [0.5, "inf"]}], "must be finite"),
        ([MERGE | {"stop": 2, "weights": [1], "norms": [1]}], "a merge needs at least two"),
        ([MERGE, MERGE], "overlaps the edit before"),
        (
            [{"kind": "replace", "start": 1, "stop": 4, "network": LAYER, "templates": []}],
            "needs 1 template layer(s), got 0",
        ),
        (
            [{"kind": "replace", "start": 1, "stop": 4, "network": LAYER, "templates": [4]}],
            "must lie in the span [1, 4)",
        ),
        ([{"kind": "replace", "start": 1, "stop": 4, "network": {"kind": "rnn"}, "templates": [1]}], "network.kind"),
        (
            [{"kind": "replace", "start": 0, "stop": 4, "network": {"kind": "linear"}, "templates": []}],
            "a span starting at 0 has none",
        ),
        (
            [{"kind": "replace", "start": 1, "stop": 4, "network": {"kind": "ffn", "count": 2}, "templates": [1]}],
            "count is for kind 'layer' only",
        ),
        (
            [{"kind": "replace", "start": 1, "stop": 4, "network": LAYER | {"residual": False}, "templates": [1]}],
            "residual: false is for ffn and swiglu only",
        ),
        (
            [{"kind": "replace", "start": 1, "stop": 4, "network": LAYER | {"width": 8}, "templates": [1]}],
            "width and activation are for kind 'ffn' only",
        ),
        (
            [
                {
                    "kind": "replace",
                    "start": 1,
                    "stop": 4,
                    "templates": [1],
                    "network": {"kind": "ffn", "residual": False, "init": "identity"},
                }
            ],
            "has no identity start",
        ),
    ],
)
def test_every_bad_edit_has_its_sentence(tmp_path, edits, reason):
    data = plan().model_dump(mode="json") | {"edits": edits}
    message = refusal(write(tmp_path / "p.json", data))
    assert reason in message
    assert "\n" not in message


def test_a_later_version_is_refused(tmp_path):
    assert "version" in refusal(write(tmp_path / "p.json", plan().model_dump(mode="json") | {"version": 2}))


@pytest.mark.parametrize(
    ("key", "value"), [("num_layers", 9), ("hidden_size", 64), ("model_type", "gpt2"), ("fingerprint", "0" * 64)]
)
def test_a_plan_refuses_another_model(key, value):
    with pytest.raises(PlanError, match=f"made for 'tiny' \\({key}"):
        plan(Remove(start=1, stop=2)).check_fits(facts(**{key: value}))


def test_a_plan_fits_its_own_model_under_any_name():
    plan(Remove(start=1, stop=2)).check_fits(facts(spec="/elsewhere"))


def test_an_edit_that_swaps_like_for_like_is_allowed():
    assert plan(Replace(start=2, stop=3, network=Network(kind="layer"), templates=(2,))).num_layers_after == 8
