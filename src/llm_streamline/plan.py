"""The plan: what will be done to a model, as data. Nothing here touches a model or imports torch.

Left of the plan a model is only read; right of it the plan is only obeyed. A plan is a JSON file that a person can read
and edit; loading checks everything that can be checked without the model, `check_fits` the rest.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from llm_streamline.errors import PlanError
from llm_streamline.schema import FrozenModel, parse

PLAN_VERSION = 1
NetworkKind = Literal["layer", "ffn", "swiglu", "linear", "patch", "bias", "scale"]
Part = Literal["attention", "mlp"]
Init = Literal[
    "first", "last", "middle", "average", "random", "identity", "best",
    "closed_form", "cosine", "hadamard", "mean", "magnitude",
]  # fmt: skip
# kinds that add no layer: they change what the layer before the span puts out, and the starts they have
_MAP_INITS = {
    "linear": ("first", "random", "identity", "best", "closed_form", "cosine"),
    "patch": ("random", "identity", "best", "closed_form", "cosine", "hadamard"),
    "bias": ("identity", "best", "mean"),
    "scale": ("identity", "best", "magnitude"),
}
_FITTED = ("closed_form", "cosine", "hadamard", "mean", "magnitude")


class ModelFacts(FrozenModel):
    """What a plan must know of the model it was made for."""

    spec: str = Field(description="the model as the user named it")
    fingerprint: str = Field(description="sha256 over configuration and samples of the weight files")
    model_type: str = Field(description="transformers' name of the family")
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_parameters: PositiveInt = Field(description="unique parameters, tied weights counted once")


class Network(FrozenModel):
    """The lightweight network trained in place of a span (LLM-Streamline, section "layer replacement")."""

    kind: NetworkKind
    count: PositiveInt = Field(1, description="decoder layers put back; always 1 for all other kinds")
    init: Init = Field("first", description="start of the weights; `best` tries all on held-out text")
    residual: bool = Field(True, description="False reproduces the paper's FFN, which learns the identity as well")
    width: PositiveInt | None = Field(None, description="hidden width of an ffn; default: the model's own MLP width")
    activation: str | None = Field(None, description="activation of an ffn; default: the model's own")

    @model_validator(mode="after")
    def _check(self) -> "Network":
        if self.kind != "layer" and self.count != 1:
            raise ValueError(f"count is for kind 'layer' only: a {self.kind} is one network")
        if not self.residual and self.kind not in ("ffn", "swiglu"):
            raise ValueError(f"residual: false is for ffn and swiglu only, not for {self.kind}")
        if not self.residual and self.init in ("identity", "best"):
            raise ValueError(f"a network without residual has no {self.init} start; use init: random or closed_form")
        if self.kind != "ffn" and (self.width is not None or self.activation is not None):
            raise ValueError("width and activation are for kind 'ffn' only")
        inits = _MAP_INITS.get(self.kind)
        if inits is None and self.init in ("cosine", "hadamard", "mean", "magnitude"):
            raise ValueError(f"a {self.kind} has no start '{self.init}'")
        if inits is not None and self.init not in inits:
            raise ValueError(f"a {self.kind} has no start '{self.init}'; use {', '.join(inits)}")
        return self

    @property
    def follows_a_layer(self) -> bool:
        """Whether it corrects what the layer before the span puts out, instead of being a layer."""
        return self.kind in _MAP_INITS

    @property
    def is_fitted(self) -> bool:
        """Whether it is nothing but plain removal until it has been fitted to text."""
        return self.follows_a_layer and self.init in _FITTED

    @property
    def num_layers_added(self) -> int:
        """Entries of the layer list that the network occupies: 0 for what corrects the layer before the span."""
        return 0 if self.follows_a_layer else self.count


class Remove(FrozenModel):
    """Take the layers [start, stop) out."""

    kind: Literal["remove"] = "remove"
    start: NonNegativeInt
    stop: PositiveInt

    @property
    def templates(self) -> tuple[int, ...]:
        """Nothing is put back."""
        return ()


class Replace(FrozenModel):
    """Take the layers [start, stop) out and put a network in their place."""

    kind: Literal["replace"] = "replace"
    start: NonNegativeInt
    stop: PositiveInt
    network: Network
    templates: tuple[NonNegativeInt, ...] = Field(
        description="original layers whose settings (attention type, ...) the layers put back take, in order"
    )

    @model_validator(mode="after")
    def _check(self) -> "Replace":
        if len(self.templates) != self.network.num_layers_added:
            raise ValueError(
                f"templates: a {self.network.kind} of count {self.network.count} needs "
                f"{self.network.num_layers_added} template layer(s), got {len(self.templates)}"
            )
        if any(not self.start <= index < self.stop for index in self.templates):
            raise ValueError(f"templates must lie in the span [{self.start}, {self.stop}), got {self.templates}")
        if self.network.follows_a_layer and self.start == 0:
            raise ValueError(
                f"a network of kind {self.network.kind} corrects the layer before the span; "
                "a span starting at 0 has none"
            )
        return self


class Merge(FrozenModel):
    """Collapse the layers [start, stop) into one, whose weights are a linear combination of theirs (LaCo).

    The layer that comes of it takes the settings (attention type, ...) of layer `start`. A merge of merges is one
    combination of original layers again, so that a plan is always told in terms of the original.
    """

    kind: Literal["merge"] = "merge"
    start: NonNegativeInt
    stop: PositiveInt
    weights: tuple[float, ...] = Field(
        description="factor of each layer of the span in every weight but those of norms"
    )
    norms: tuple[float, ...] = Field(description="factor of each layer of the span in the weights of norms")

    @model_validator(mode="after")
    def _check(self) -> "Merge":
        size = self.stop - self.start
        for name, factors in (("weights", self.weights), ("norms", self.norms)):
            if len(factors) != size:
                raise ValueError(f"{name}: a merge of {size} layers needs {size} factors, got {len(factors)}")
            if not all(math.isfinite(factor) for factor in factors):
                raise ValueError(f"{name} must be finite numbers, got {factors}")
        if size == 1:
            raise ValueError(f"merge [{self.start}, {self.stop}) holds one layer; a merge needs at least two")
        return self

    @property
    def templates(self) -> tuple[int, ...]:
        """The first layer lends its settings."""
        return (self.start,)


class Silence(FrozenModel):
    """Make one sublayer of the layers [start, stop) add exactly nothing to the residual stream; the layers stay."""

    kind: Literal["silence"] = "silence"
    start: NonNegativeInt
    stop: PositiveInt
    part: Part

    @property
    def templates(self) -> tuple[int, ...]:
        """The layers themselves."""
        return tuple(range(self.start, self.stop))


Edit = Annotated[Remove | Replace | Merge | Silence, Field(discriminator="kind")]


def templates_for(network: Network, start: int, stop: int) -> tuple[int, ...]:
    """Original layers that a network's layers are modelled on: the first ones, or the last ones for init `last`."""
    count = network.num_layers_added
    if network.init == "last":
        return tuple(range(stop - count, stop))
    if network.init == "middle":
        middle = start + (stop - start - count) // 2
        return tuple(range(middle, middle + count))
    return tuple(range(start, start + count))


class Candidate(FrozenModel):
    """A span, or several at once, that was considered."""

    start: int
    stop: int
    more: tuple[tuple[int, int], ...] = Field((), description="further spans of a candidate that has several")
    similarity: float | None = Field(None, description="mean cosine over all calibration tokens")
    similarity_first: float | None = Field(None, description="mean cosine over the first token of each window only")
    similarity_rest: float | None = Field(None, description="mean cosine over the other tokens")
    score: float | None = Field(None, description="the method's own number, `score_name`; low is removed first")
    heldout_loss: float | None = Field(None, description="LM loss on held-out windows after the edit, in nats a token")

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """All of its spans, ascending."""
        return ((self.start, self.stop), *self.more)


class Margin(FrozenModel):
    """How clearly the chosen span leads, by a bootstrap over windows."""

    quantity: str = Field(description="what is compared: `similarity`, `heldout_loss` or the method's score")
    difference: float = Field(description="how much better the chosen one is than the runner-up: positive")
    low: float = Field(description="2.5th percentile of the difference over bootstrap samples of windows")
    high: float = Field(description="97.5th percentile")
    num_blocks: int = Field(description="windows, or groups of windows, that were resampled")


class Selection(FrozenModel):
    """How the edits were chosen: kept for the reader, not needed to obey the plan."""

    method: str
    target: str = Field(description="the user's target in words")
    convention: str = Field(description="how the number of layers was counted")
    chosen: tuple[int, int] | None = None
    order: tuple[int, ...] = Field((), description="layers in the order they were chosen, where they were single ones")
    candidates: tuple[Candidate, ...] = ()
    score_name: str = Field("", description="what the candidates' `score` is")
    cost: float | None = Field(
        None,
        description="what the choice took, in forwards of the whole model over the calibration text",
    )
    original_loss: float | None = Field(None, description="LM loss of the original on the verification windows")
    margin: Margin | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = Field((), description="runtimes in which the edited model will give wrong output")


class Plan(FrozenModel):
    """What will be done to one model."""

    version: Literal[1] = PLAN_VERSION
    model: ModelFacts
    edits: tuple[Edit, ...]
    selection: Selection | None = None

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        previous_stop, num_layers, silent, after_silence = 0, self.model.num_layers, set(), False
        for edit in self.edits:
            name = f"{edit.kind} [{edit.start}, {edit.stop})"
            if edit.start >= edit.stop:
                raise ValueError(f"{name} is empty; a span is half-open, so stop must be larger than start")
            if edit.stop > num_layers:
                raise ValueError(
                    f"{name} runs past the last layer (the model has layers 0-{num_layers - 1}). "
                    "Was this plan made for another model?"
                )
            if edit.start < previous_stop:
                raise ValueError(f"{name} overlaps the edit before it or is out of order; spans must ascend")
            if isinstance(edit, Replace) and edit.network.kind == "linear" and edit.start - 1 in silent:
                raise ValueError(f"{name}: a linear map is folded into layer {edit.start - 1}, whose MLP is silenced")
            if (
                isinstance(edit, Replace)
                and edit.network.follows_a_layer
                and edit.start == previous_stop
                and not (edit.network.kind == "linear" and after_silence)
            ):
                raise ValueError(
                    f"{name} begins where the edit before it ends, so that no layer of the original stands before "
                    f"it for a {edit.network.kind} to correct; make the two spans one"
                )
            if isinstance(edit, Silence) and edit.part == "mlp":
                silent |= set(edit.templates)
            after_silence = isinstance(edit, Silence)
            previous_stop = edit.stop
        if not self.layer_sources():
            raise ValueError("the edits remove every layer; at least one must stay")
        return self

    def layer_sources(self) -> tuple[int, ...]:
        """For each layer of the edited model, the original layer whose settings it takes."""
        sources, position = [], 0
        for edit in self.edits:
            sources += [*range(position, edit.start), *edit.templates]
            position = edit.stop
        return (*sources, *range(position, self.model.num_layers))

    def position_of(self, edit: Edit) -> int:
        """Index in the edited model of the first layer that stands in for `edit`."""
        shift = 0
        for other in self.edits:
            if other.start >= edit.start:
                break
            shift += len(other.templates) - (other.stop - other.start)
        return edit.start + shift

    @property
    def num_layers_after(self) -> int:
        """Layers of the edited model."""
        return len(self.layer_sources())

    def check_fits(self, model: ModelFacts) -> None:
        """Refuse a model other than the one this plan was made for.

        Raises:
            PlanError: if layer count, width, family or fingerprint differ.
        """
        for key in ("model_type", "num_layers", "hidden_size", "fingerprint"):
            mine, other = getattr(self.model, key), getattr(model, key)
            if mine != other:
                raise PlanError(
                    f"this plan was made for '{self.model.spec}' ({key} {mine}), but '{model.spec}' has {key} {other}; "
                    "make a plan for this model with `llm-streamline plan`"
                )

    def describe(self) -> str:
        """One sentence: what leaves, what stands in, how many layers remain."""
        parts = []
        for edit in self.edits:
            size = edit.stop - edit.start
            if isinstance(edit, Silence):
                parts.append(f"silence the {edit.part} of {size} of {self.model.num_layers} layers {_span_name(edit)}")
                continue
            verb = "merge" if isinstance(edit, Merge) else "remove"
            text = f"{verb} {size} of {self.model.num_layers} layers [{edit.start}, {edit.stop})"
            if isinstance(edit, Replace):
                text += f" and put {_network_name(edit.network)} in their place"
            elif isinstance(edit, Merge):
                text += " into one"
            parts.append(text)
        return f"{'; '.join(parts) or 'change nothing'}: {self.model.num_layers} -> {self.num_layers_after} layers"

    def digest(self) -> str:
        """sha256 (first 16 hex digits) over model and edits: equal when two plans do the same thing."""
        content = self.model_dump(mode="json", include={"version", "model", "edits"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read and check a plan file.

        Raises:
            PlanError: if the file is missing, is no JSON, has unknown keys, or its edits overlap or run out of range.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(f"no plan file at {path}; `llm-streamline plan MODEL -o {path}` makes one") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
            raise PlanError(f"{path} cannot be read as a plan: {problem}") from None
        return parse(cls, data, str(path), PlanError)


def _span_name(edit: Edit) -> str:
    return f"[{edit.start}, {edit.stop})"


def _network_name(network: Network) -> str:
    if network.kind == "layer":
        return "one decoder layer" if network.count == 1 else f"{network.count} decoder layers"
    return {
        "ffn": "an FFN",
        "swiglu": "a SwiGLU",
        "linear": "a linear map (folded into the layer before)",
        "patch": "a linear patch of the residual stream",
        "bias": "a constant",
        "scale": "a factor",
    }[network.kind]
