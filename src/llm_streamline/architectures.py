"""All families of the installed transformers: sound, refused or untested.

`sound` means that the oracle tests pass on a tiny model of the family; a test keeps rows and proofs the same set, so
the table cannot promise what is not tested.
"""

from dataclasses import dataclass
from typing import Literal

from llm_streamline.families import FAMILIES, REFUSED, WRAPPERS


@dataclass(frozen=True)
class FamilyStatus:
    """What we can say about one model type."""

    model_type: str
    status: Literal["sound", "refused", "untested"]
    reason: str  # why refused, or under which settings a sound family is refused or limited; may be empty


def list_architectures() -> list[FamilyStatus]:
    """Every causal language model type of the installed transformers, and every row of ours, sorted by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES, *REFUSED, *WRAPPERS})
    return [_status(name) for name in names]


def _status(name: str) -> FamilyStatus:
    if name in REFUSED:
        return FamilyStatus(name, "refused", REFUSED[name])
    if name in WRAPPERS:
        return FamilyStatus(name, "sound", "the language model inside is cut, the rest kept")
    if name not in FAMILIES:
        return FamilyStatus(name, "untested", "")
    family = FAMILIES[name]
    notes = [f"refused with {condition.key}: {condition.reason}" for condition in family.refused]
    notes += [f"no identity start with {condition.key} = {condition.values[0]}" for condition in family.not_identity]
    if family.cache_kinds:
        notes.append(f"at least one {' or '.join(family.cache_kinds)} layer must stay")
    return FamilyStatus(name, "sound", "; ".join(notes))
