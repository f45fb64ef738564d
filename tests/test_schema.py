import pytest
from pydantic import Field

from llm_streamline.errors import ConfigError, PlanError
from llm_streamline.schema import FrozenModel, did_you_mean, parse


class Inner(FrozenModel):
    width: int = Field(1, ge=1)


class Outer(FrozenModel):
    inner: Inner = Inner()
    names: tuple[str, ...] = ()
    needed: int = 0


class Strict(FrozenModel):
    needed: int


def refused(model, data, error=ConfigError):
    with pytest.raises(error) as caught:
        parse(model, data, "some.yaml", error)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("some.yaml: ")
    return message


def test_a_sound_mapping_becomes_the_model():
    assert parse(Outer, {"inner": {"width": 3}}, "here") == Outer(inner=Inner(width=3))


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    message = refused(Outer, {"inner": {"widht": 3}})
    assert "unknown key 'inner.widht'. Did you mean 'width'? Known here: width." in message


def test_a_missing_key_is_named():
    assert "the key 'needed' is missing" in refused(Strict, {})


def test_a_wrong_value_is_shown_with_its_key():
    message = refused(Outer, {"inner": {"width": 0}})
    assert "inner.width" in message
    assert "(got 0)" in message


def test_further_problems_are_counted():
    assert "(1 more problem(s) after this one)" in refused(Outer, {"inner": {"width": 0}, "needed": "many"})


@pytest.mark.parametrize("data", [None, 3, "text", [1]])
def test_what_is_no_mapping_is_refused(data):
    refused(Outer, data)


def test_the_caller_chooses_the_error():
    refused(Outer, {"x": 1}, PlanError)


def test_models_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Inner().width = 2


def test_far_words_get_no_suggestion():
    assert did_you_mean("zzz", ["layers"]) == ""
    assert did_you_mean("layer", ["layers", "sparsity"]) == " Did you mean 'layers'?"
