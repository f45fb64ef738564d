"""mergekit's slices: what mergekit-yaml would read, and plans from what people wrote for it."""

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from export_plans import facts, removing, replacing

from llm_streamline.errors import PlanError
from llm_streamline.export.slices import from_slices, to_slices


def test_the_kept_runs_are_written_end_exclusive():
    written = yaml.safe_load(to_slices(removing(32, (0, 2), (21, 30)), model="org/model", dtype="float16"))
    assert written == {
        "slices": [
            {"sources": [{"model": "org/model", "layer_range": [2, 21]}]},
            {"sources": [{"model": "org/model", "layer_range": [30, 32]}]},
        ],
        "merge_method": "passthrough",
        "dtype": "float16",
    }


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(lambda kept: any(kept)))
def test_there_and_back_keeps_the_layers(tmp_path_factory, kept):
    starts = [i for i, stays in enumerate(kept) if not stays]
    plan = removing(len(kept), *((i, i + 1) for i in starts))
    path = tmp_path_factory.mktemp("slices") / "s.yaml"
    path.write_text(to_slices(plan))
    assert from_slices(path, plan.model).layer_sources() == plan.layer_sources()


def test_a_published_recipe_is_read(tmp_path):
    # the form of the pruned Llama-3 recipes on the Hub (PruneMe: layers 20 to 25 of 32 left out)
    path = tmp_path / "s.yaml"
    path.write_text(
        "slices:\n  - sources:\n    - model: meta-llama/Meta-Llama-3-8B\n      layer_range: [0, 20]\n"
        "  - sources:\n    - model: meta-llama/Meta-Llama-3-8B\n      layer_range: [26, 32]\n"
        "merge_method: passthrough\ndtype: bfloat16\n"
    )
    plan = from_slices(path, facts(32))
    assert [(edit.start, edit.stop) for edit in plan.edits] == [(20, 26)]


def test_a_replacement_cannot_be_told():
    with pytest.raises(PlanError, match="copy layers of existing models"):
        to_slices(replacing(8, 2, 5))


ONE = {"sources": [{"model": "m", "layer_range": [0, 4]}]}


def part(start, stop, model="m", **rest):
    return {"sources": [{"model": model, "layer_range": [start, stop], **rest}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "no list `slices`"),
        ({"slices": []}, "no list `slices`"),
        ({"slices": [ONE], "merge_method": "linear"}, "merge method 'linear'"),
        ({"slices": [part(0, 4), part(2, 8)]}, "repeats or reorders"),
        ({"slices": [part(4, 8), part(0, 4)]}, "repeats or reorders"),
        ({"slices": [part(0, 9)]}, "has 8 layers"),
        ({"slices": [part(3, 3)]}, "0 <= start < end"),
        ({"slices": [part(0, "4")]}, "0 <= start < end"),
        ({"slices": [part(0, 4), part(4, 8, model="other")]}, "several models"),
        ({"slices": [{"sources": [*ONE["sources"], *ONE["sources"]]}]}, "several models in one slice"),
        ({"slices": [part(0, 4, parameters={"scale": 0.5})]}, "changes weights"),
    ],
)
def test_what_no_plan_can_say_is_refused(content, message, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(PlanError, match=message):
        from_slices(path, facts(8))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        from_slices(tmp_path / "none.yaml", facts(8))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(PlanError, match="cannot be read"):
        from_slices(tmp_path / "bad.yaml", facts(8))
    (tmp_path / "code.yaml").write_text("slices: !!python/object/apply:os.getcwd []")
    with pytest.raises(PlanError, match="cannot be read"):
        from_slices(tmp_path / "code.yaml", facts(8))
