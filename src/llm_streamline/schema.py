"""The base of everything we read from and write to files: frozen pydantic models with strict keys, and clear errors."""

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llm_streamline.errors import ConfigError, StreamlineError


class FrozenModel(BaseModel):
    """Immutable, and an unknown key is an error: a typo in a recipe must never be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], data: Any, where: str, error: type[StreamlineError] = ConfigError) -> Model:
    """Build `model` from plain data; the first problem becomes one sentence that names the key.

    Args:
        model: the pydantic class.
        data: what was read from a file or put together from options.
        where: file or option the data came from, for the message.
        error: class of the error to raise.

    Raises:
        StreamlineError: (of class `error`) if a key is unknown, missing, or its value does not fit.
    """
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        raise error(f"{where}: {_explain(problem, model)}") from None


def _explain(problem: ValidationError, model: type[BaseModel]) -> str:
    first = problem.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" ({problem.error_count() - 1} more problem(s) after this one)" if problem.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1])
        near = did_you_mean(str(first["loc"][-1]), known)
        return f"unknown key '{path}'.{near} Known here: {', '.join(sorted(known))}.{more}"
    if first["type"] == "missing":
        return f"the key '{path}' is missing{more}."
    message = first["msg"].removeprefix("Value error, ")
    got = "" if path == "" else f" (got {first.get('input')!r})"
    return f"{path + ': ' if path else ''}{message}{got}{more}"


def _keys_at(model: type[BaseModel], location: tuple) -> list[str]:
    """The keys allowed at `location`, following nested models by their annotation where that is one model."""
    here: Any = model
    for part in location:
        fields = getattr(here, "model_fields", None)
        if not fields or part not in fields:
            continue  # an index into a tuple, or the tag of a union
        annotation = fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        here = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), here)
    return list(getattr(here, "model_fields", {}))


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return " Did you mean 'x'?" for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
