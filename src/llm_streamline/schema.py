"""The base of everything we read from and write to files: frozen pydantic models with strict keys, and clear errors."""

import difflib
from typing import Any, TypeVar, get_args

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
    """The keys allowed at `location`, following nested models, tuples of them and the tags of unions."""
    here = [model]
    for part in location:
        if isinstance(part, int):
            continue  # an index into a tuple
        deeper = [m for one in here if part in one.model_fields for m in _models_in(one.model_fields[part].annotation)]
        here = deeper or [one for one in here if _has_tag(one, part)] or here
    return sorted({name for one in here for name in one.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models named anywhere in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in model.model_fields.values())


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return " Did you mean 'x'?" for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
