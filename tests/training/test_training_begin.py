import pytest
import torch
from plans import facts_of, replace, replacing, tiny_windows
from tiny import tiny_model

from llm_streamline.arch import find_arch, get_layers, silence
from llm_streamline.config import ReplacementConfig, TrainingConfig
from llm_streamline.errors import ArchitectureError
from llm_streamline.plan import Plan
from llm_streamline.training.begin import StartSettings, begin
from llm_streamline.training.student import Student

TRAIN, HELD_OUT = tiny_windows(12), tiny_windows(4, seed=1)
SETTINGS = StartSettings.of(ReplacementConfig(), 64, 0)


def begun(model, plan):
    return begin(model, plan, TRAIN, HELD_OUT, SETTINGS)


@pytest.mark.parametrize(
    ("name", "kind", "tried"),
    [
        ("llama", "layer", {"first", "last", "average", "identity", "closed_form"}),
        ("llama", "swiglu", {"first", "last", "average", "identity", "closed_form"}),
        ("llama", "ffn", {"identity", "closed_form"}),
        ("llama", "linear", {"identity", "closed_form"}),
        ("gemma2", "layer", {"first", "identity", "closed_form"}),  # unlike layers, and a norm behind the MLP
        ("mixtral", "layer", {"first", "last", "average", "identity"}),
        ("opt_post_norm", "layer", {"first", "last", "average"}),
    ],
)
def test_best_tries_every_start_and_keeps_the_best(name, kind, tried):
    model = tiny_model(name)
    plan = replacing(model, 2, 5, kind, init="best")
    replacements, trials = begun(model, plan)
    assert {start.partition(" ")[0] for start in trials} == tried
    student = Student(model, plan, replacements, TrainingConfig(objective="lm"))
    assert float(student.token_losses(HELD_OUT.input_ids).mean()) == pytest.approx(min(trials.values()), abs=1e-5)


def test_best_finds_that_the_span_does_nothing():
    model = tiny_model()
    for layer in (2, 3, 4):
        silence(get_layers(model)[layer], find_arch(model))
    replacements, trials = begun(model, replacing(model, 2, 5, init="best"))
    original = model(HELD_OUT.input_ids.long(), use_cache=False).logits
    assert trials["identity"] == pytest.approx(trials["first"])
    found = Student(model, replacing(model, 2, 5), replacements, TrainingConfig(objective="kl"))
    assert original.isfinite().all()
    assert float(found(HELD_OUT.input_ids)["loss"]) >= 0


def test_a_named_start_is_taken_without_trial():
    model = tiny_model()
    replacements, trials = begun(model, replacing(model, 2, 5, init="last"))
    assert trials == {}
    assert torch.equal(replacements[0].layers[0].mlp.up_proj.weight, get_layers(model)[4].mlp.up_proj.weight)


def test_the_start_depends_on_the_seed_alone():
    model = tiny_model()
    for kind, init in (("ffn", "best"), ("ffn", "closed_form"), ("linear", "closed_form"), ("layer", "best")):
        states = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            states.append(begun(model, replacing(model, 2, 5, kind, init=init))[0][0].state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), (kind, init)


def test_each_network_of_a_plan_gets_its_start():
    model = tiny_model()
    plan = Plan(model=facts_of(model), edits=(replace(1, 3, init="best"), replace(5, 7, "linear", init="best")))
    replacements, trials = begun(model, plan)
    assert len(replacements) == 2
    assert {name.partition(":")[0] for name in trials} == {"0", "1"}


def test_a_closed_form_that_does_not_exist_is_refused():
    model = tiny_model("mixtral")
    with pytest.raises(ArchitectureError, match="no closed form for this mixtral"):
        begun(model, replacing(model, 2, 5, init="closed_form"))


def test_more_tokens_to_fit_on_than_there_are_is_no_problem():
    model = tiny_model()
    settings = StartSettings(ridge=0.1, fit_tokens=10**9, batch_tokens=10**9, seed=0)
    begin(model, replacing(model, 2, 5, "linear", init="closed_form"), TRAIN, HELD_OUT, settings)
