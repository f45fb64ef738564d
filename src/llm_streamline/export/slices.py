"""Plans as mergekit's slices, and mergekit's slices as plans.

mergekit (https://github.com/arcee-ai/mergekit) describes a depth-pruned model by the runs of layers that stay, with the
merge method `passthrough`: `layer_range: [start, end]`, 0-based, end exclusive, as our spans are.
"""

from pathlib import Path
from typing import Any

import yaml

from llm_streamline.errors import PlanError
from llm_streamline.plan import ModelFacts, Plan, Remove, Selection


def to_slices(plan: Plan, *, model: str | None = None, dtype: str = "bfloat16") -> str:
    """The YAML from which `mergekit-yaml` builds the model that `plan` describes.

    Args:
        plan: with edits of kind remove only.
        model: the original model as mergekit is to find it (folder or Hub id); by default as the plan names it.
        dtype: float32, float16 or bfloat16.

    Raises:
        PlanError: the plan replaces layers: mergekit copies layers of existing models.
    """
    replaced = [edit for edit in plan.edits if edit.kind != "remove"]
    if replaced:
        raise PlanError(
            f"the plan makes new weights for [{replaced[0].start}, {replaced[0].stop}), which mergekit's slices "
            "cannot say: they copy layers of existing models. Hand over the trained folder instead"
        )
    name = model or plan.model.spec
    runs = [{"sources": [{"model": name, "layer_range": [start, stop]}]} for start, stop in kept_runs(plan)]
    header = f"# {plan.describe()}; layer_range is 0-based, end exclusive\n"
    return header + yaml.safe_dump({"slices": runs, "merge_method": "passthrough", "dtype": dtype}, sort_keys=False)


def kept_runs(plan: Plan) -> list[tuple[int, int]]:
    """The spans of original layers that stay, in order."""
    runs, position = [], 0
    for edit in plan.edits:
        runs.append((position, edit.start))
        position = edit.stop
    runs.append((position, plan.model.num_layers))
    return [(start, stop) for start, stop in runs if start < stop]


def from_slices(source: str | Path, facts: ModelFacts) -> Plan:
    """The plan that a file of mergekit's slices describes.

    Args:
        source: path of a YAML file.
        facts: the model the slices are taken from; they may name it differently.

    Raises:
        PlanError: not such a file; another merge method; more than one model; layers repeated, reordered or scaled.
    """
    path = Path(source)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"{path} cannot be read as mergekit's slices: {' '.join(str(error).split())}") from error
    runs = _runs(content, path)
    edits, position = [], 0
    for start, stop in runs:
        if stop > facts.num_layers:
            raise PlanError(f"{path} takes layers [{start}, {stop}), but '{facts.spec}' has {facts.num_layers} layers")
        if start < position:
            raise PlanError(
                f"{path} repeats or reorders layers ([{start}, {stop}) comes after layer {position - 1}); only "
                "removing layers can be planned"
            )
        if start > position:
            edits.append(Remove(start=position, stop=start))
        position = stop
    if position < facts.num_layers:
        edits.append(Remove(start=position, stop=facts.num_layers))
    removed = sum(edit.stop - edit.start for edit in edits)
    selection = Selection(
        method="mergekit slices",
        target=f"the layers that {path.name} keeps",
        convention=f"{removed} layers leave, {facts.num_layers - removed} remain",
    )
    return Plan(model=facts, edits=tuple(edits), selection=selection)


def _runs(content: Any, path: Path) -> list[tuple[int, int]]:
    slices = content.get("slices") if isinstance(content, dict) else None
    if not isinstance(slices, list) or not slices:
        raise PlanError(f"{path} has no list `slices`; is it a file for mergekit's merge method passthrough?")
    method = content.get("merge_method", "passthrough")
    if method != "passthrough":
        raise PlanError(f"{path} asks for the merge method {method!r}; only passthrough keeps layers as they are")
    runs, models = [], set()
    for item in slices:
        sources = item.get("sources") if isinstance(item, dict) else None
        if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
            raise PlanError(f"{path} mixes several models in one slice, or names none: {item!r}")
        bounds = sources[0].get("layer_range")
        whole = isinstance(bounds, list) and len(bounds) == 2 and all(type(value) is int for value in bounds)
        if not whole or not 0 <= bounds[0] < bounds[1]:
            raise PlanError(f"{path} has the layer_range {bounds!r}; it must be [start, end] with 0 <= start < end")
        scaled = sources[0].get("parameters") or item.get("parameters") or content.get("parameters")
        if scaled:
            raise PlanError(f"{path} changes weights as it copies them (parameters: {scaled!r}), which no plan can say")
        models.add(str(sources[0].get("model")))
        runs.append((bounds[0], bounds[1]))
    if len(models) > 1:
        raise PlanError(f"{path} takes layers from several models ({', '.join(sorted(models))}); a plan is for one")
    return runs
