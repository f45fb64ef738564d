"""All families of the installed transformers: sound, refused or untested, as the tests recorded it.

`architectures.json` is written by the oracle tests (`pytest tests/test_oracles.py tests/test_architectures.py
--record-architectures`): the families for which every oracle passed on every tiny model, and those seen refused. A row
in `families.py` whose proof is not recorded counts as untested, so the table cannot promise what was not run.
"""

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_streamline.families import FAMILIES, REFUSED, WRAPPERS


@dataclass(frozen=True)
class FamilyStatus:
    """What we can say about one model type."""

    model_type: str
    status: Literal["sound", "refused", "untested"]
    reason: str  # why refused, or under which settings a sound family is refused or limited; may be empty


def recorded() -> dict[str, Any]:
    """What the tests recorded: `sound` (family -> cases), `refused` (family -> reason), `oracles`, versions."""
    return json.loads(Path(__file__).with_name("architectures.json").read_text(encoding="utf-8"))


def proven_on() -> str:
    """The version of transformers that the record was made with, and whether it is the installed one."""
    theirs, ours = recorded()["transformers"], importlib.metadata.version("transformers")
    said = f"proven on transformers {theirs}"
    return said if theirs == ours else f"{said}; installed is {ours}: run its oracle tests before you rely on it"


def list_architectures() -> list[FamilyStatus]:
    """Every causal language model type of the installed transformers, and every row of ours, sorted by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    record = recorded()
    names = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES, *REFUSED, *WRAPPERS})
    return [_status(name, record) for name in names]


def _status(name: str, record: dict[str, Any]) -> FamilyStatus:
    if name in record["refused"]:
        return FamilyStatus(name, "refused", record["refused"][name])
    if name not in record["sound"]:
        known = name in FAMILIES or name in WRAPPERS or name in REFUSED
        return FamilyStatus(name, "untested", "its tests are not recorded" if known else "")
    if name in WRAPPERS:
        return FamilyStatus(name, "sound", "the language model inside is cut, the rest kept")
    family = FAMILIES[name]
    notes = [f"refused with {condition.key}: {condition.reason}" for condition in family.refused]
    notes += [f"no identity start with {condition.key} = {condition.values[0]}" for condition in family.not_identity]
    if family.cache_kinds:
        notes.append(f"at least one {' or '.join(family.cache_kinds)} layer must stay")
    return FamilyStatus(name, "sound", "; ".join(notes))
