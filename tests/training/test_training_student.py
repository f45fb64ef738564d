"""The student: what it computes, what it trains, and what it never runs."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from plans import facts_of, removing, replace, replacing
from tiny import tiny_model, tiny_tokens
from torch import nn

from llm_streamline.arch import get_layers
from llm_streamline.config import TrainingConfig
from llm_streamline.measure.partial import run_tapped
from llm_streamline.plan import Plan
from llm_streamline.replacements.build import build_replacements, install_plan
from llm_streamline.replacements.starts import set_start
from llm_streamline.surgery import apply_plan
from llm_streamline.training.student import Student

FAMILIES = ["llama", "gemma2", "gpt2", "bloom", "falcon", "gptj", "gpt_neo", "opt", "qwen2", "mixtral"]


def student_of(model, objective="mse", span=(3, 6), kind="layer", init="first", **config):
    plan = replacing(model, *span, kind, init=init)
    replacements = build_replacements(model, plan)
    for replacement in replacements:
        set_start(replacement, model, init, 0)
    return Student(model, plan, replacements, TrainingConfig(objective=objective, **config))


def fingerprint(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def states_of(model, ids):
    with torch.no_grad():
        return run_tapped(model, {"input_ids": ids}, range(len(get_layers(model)) + 1))


@pytest.mark.parametrize("weighting", ["uniform", "skip_first"])
def test_the_identitys_error_is_what_the_layers_did(weighting):
    model, ids = tiny_model(), tiny_tokens()
    student = student_of(model, init="identity", mse_weighting=weighting)
    states, _ = states_of(model, ids)
    cut = slice(1, None) if weighting == "skip_first" else slice(None)
    wanted = F.mse_loss(states[3][:, cut], states[6][:, cut])
    torch.testing.assert_close(student(ids)["loss"], wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_the_whole_edited_model(name):
    """Sharing the prefix must not change a number: the truth runs teacher and pruned model in full."""
    model, ids = tiny_model(name), tiny_tokens()
    objective = {"mse": 0.3, "lm": 0.5, "kl": 2.0}
    student = student_of(model, objective, span=(4, 7), mse_weighting="uniform")
    states, teacher = states_of(model, ids)
    edited = tiny_model(name)
    install_plan(edited, replacing(model, 4, 7), list(student.replacements))
    own, logits = states_of(edited, ids)
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    p = teacher.double().softmax(-1)
    kl = (p * (teacher.double().log_softmax(-1) - logits.double().log_softmax(-1))).sum(-1).mean()
    truth = {"mse": F.mse_loss(own[5], states[7]), "lm": lm, "kl": kl.float()}
    found = student(ids)
    for part, value in truth.items():
        torch.testing.assert_close(found[part], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], sum(objective[k] * truth[k] for k in truth), rtol=1e-4, atol=1e-5)
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(student.token_losses(ids), each, rtol=1e-4, atol=1e-4)


def test_the_mse_of_several_networks_is_the_mean_each_at_its_own_span():
    model, ids = tiny_model(), tiny_tokens()
    plan = Plan(model=facts_of(model), edits=(replace(1, 3), replace(5, 8)))
    networks = build_replacements(model, plan)
    student = Student(model, plan, networks, TrainingConfig(objective="mse", mse_weighting="uniform"))
    states, edited = states_of(model, ids)[0], tiny_model()
    install_plan(edited, plan, networks)
    own = states_of(edited, ids)[0]
    truth = (F.mse_loss(own[2], states[3]) + F.mse_loss(own[5], states[8])) / 2
    torch.testing.assert_close(student(ids)["loss"], truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "swiglu", "ffn", "linear"])
@pytest.mark.parametrize("objective", ["mse", "lm", "kl=1,mse=0.1"])
def test_only_the_replacement_has_gradients_and_the_teacher_stays(kind, objective):
    model = tiny_model()
    before = fingerprint(model)
    student = student_of(model, objective, kind=kind, init="random")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(tiny_tokens())["loss"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    trainable = [p for r in student.replacements for _, p in r.trainable()]
    assert trainable
    for parameter in student.parameters():
        assert (parameter.grad is not None) == any(parameter is t for t in trainable)
    assert all(torch.isfinite(p.grad).all() for p in trainable)
    assert any(p.grad.abs().max() > 0 for p in trainable)
    optimizer.step()
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", ["layer", "swiglu", "ffn", "linear"])
def test_the_identity_can_be_left_by_training(kind):
    """Only last projections are zero: with zero gates as well there would be no gradient (pitfalls E)."""
    student = student_of(tiny_model(), kind=kind, init="identity")
    student(tiny_tokens())["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


def test_layers_are_frozen_by_identity_not_by_name():
    """Defect D4 of the reference: "layers.2" is in the names of layers 20 to 29 as well."""
    model = tiny_model(num_hidden_layers=24)
    student = student_of(model, "lm", span=(2, 5))
    student(tiny_tokens())["loss"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    own = sum(p.numel() for p in get_layers(model)[2].parameters())
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == own


def test_the_original_is_no_part_of_the_student():
    model = tiny_model()
    student = student_of(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in student.parameters()}
    assert all(name.startswith("replacements.") for name in student.state_dict())


def record(model):
    called = []
    for index, layer in enumerate(get_layers(model)):
        layer.register_forward_pre_hook(lambda _m, _a, index=index: called.append(index))
    return called


def test_mse_never_runs_layers_above_the_span():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    student = student_of(model)
    called = record(model)
    student(tiny_tokens())["loss"].backward()
    assert called == list(range(6))


@pytest.mark.parametrize(("objective", "teacher"), [("lm", range(3)), ("kl", range(8))])
def test_the_prefix_runs_once_for_teacher_and_student(objective, teacher):
    model = tiny_model()
    student = student_of(model, objective)
    called = record(model)
    student(tiny_tokens())
    assert called == [*teacher, 6, 7]


def test_training_mode_brings_no_dropout():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    student = student_of(model, "kl")
    calm = student(tiny_tokens())["loss"]
    student.train()
    assert torch.equal(student(tiny_tokens())["loss"], calm)


def test_a_float32_model_is_trained_in_float32():
    model, ids = tiny_model(), tiny_tokens()
    removed = tiny_model()
    apply_plan(removed, removing(model, 3, 6))
    logits = removed(ids, use_cache=False).logits
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert torch.equal(student_of(model, "lm", init="identity").token_losses(ids).flatten(), truth)


def test_a_bfloat16_model_keeps_float32_master_weights():
    model = tiny_model().bfloat16()
    student = student_of(model, "kl")
    student(tiny_tokens())["loss"].backward()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in student.parameters() if p.grad is not None} == {torch.float32}


def test_the_replacement_is_a_module_tree_of_its_own():
    student = student_of(tiny_model())
    assert isinstance(student.replacements, nn.ModuleList)
