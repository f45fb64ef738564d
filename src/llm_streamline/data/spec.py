"""How a text is named: `[WEIGHT*]SOURCE[#FIELD]`. Pure strings, no files are touched and no torch is imported."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from llm_streamline.errors import TextError

DEFAULT_FIELD = "text"
DEFAULT_SPLIT = "train"
GRAMMAR = (
    "[WEIGHT*]SOURCE[#FIELD], where SOURCE is a path, a glob, hub:NAME[:CONFIG][@SPLIT], builtin or self; "
    "for example 0.7*corpus/*.jsonl.gz#text"
)
_WEIGHT = re.compile(r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)\*(.*)", re.DOTALL)
_FIELD = re.compile(r"(.+)#([^#/\\*]*)", re.DOTALL)


@dataclass(frozen=True)
class TextSpec:
    """A text source as it was asked for, and its share of a mixture."""

    text: str  # the specification as written
    kind: Literal["files", "hub", "builtin", "self"]
    source: str  # path or glob, name on the Hub, or the kind again
    weight: float = 1.0  # share of the tokens relative to the other sources' weights
    field: str = DEFAULT_FIELD  # record field that holds the text (.jsonl, .parquet, Hub)
    has_field: bool = False  # whether the field was named, rather than assumed
    config: str | None = None  # configuration of a Hub data set
    split: str = DEFAULT_SPLIT  # split of a Hub data set

    @property
    def key(self) -> str:
        """What the source is, without its weight: equal keys mean the same text."""
        return f"{self.kind}:{self.source}:{self.config or ''}@{self.split}#{self.field}"


def parse_spec(spec: str | TextSpec) -> TextSpec:
    """Read one text specification.

    A number before the first `*` is a weight. A glob that starts with a number and a star is written with its folder:
    `./2024*.txt`.

    Raises:
        TextError: if the specification is empty, the weight is not positive and finite, or a name is missing.
    """
    if isinstance(spec, TextSpec):
        return spec
    weight, rest = 1.0, spec.strip()
    if match := _WEIGHT.fullmatch(rest):
        weight, rest = float(match[1]), match[2].strip()
        if not (weight > 0 and math.isfinite(weight)):
            raise TextError(
                f"text '{spec}': the weight must be a positive number, got {match[1]}; leave the source out"
            )
    field, has_field = DEFAULT_FIELD, False
    if match := _FIELD.fullmatch(rest):
        rest, field, has_field = match[1], match[2].strip(), True
        if not field:
            raise TextError(f"text '{spec}': no field is named after '#'; write for example {rest}#{DEFAULT_FIELD}")
    if not rest or rest.startswith("#"):
        raise TextError(f"text '{spec}' names no source; a text is written {GRAMMAR}")
    common = {"text": spec.strip(), "weight": weight, "field": field, "has_field": has_field}
    if rest in ("builtin", "self"):
        if has_field:
            raise TextError(f"text '{spec}': `{rest}` has no fields; write {rest}")
        return TextSpec(kind=rest, source=rest, **common)
    if rest.startswith("hub:"):
        return _parse_hub(spec, rest.removeprefix("hub:"), common)
    return TextSpec(kind="files", source=rest, **common)


def _parse_hub(spec: str, rest: str, common: dict) -> TextSpec:
    name, at, split = rest.rpartition("@")
    if not at:
        name, split = rest, DEFAULT_SPLIT
    name, colon, config = name.partition(":")
    if not name or not split or (colon and not config):
        raise TextError(f"text '{spec}' is incomplete; a Hub data set is written hub:NAME[:CONFIG][@SPLIT][#FIELD]")
    return TextSpec(kind="hub", source=name, config=config or None, split=split, **common)
