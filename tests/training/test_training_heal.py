"""The healing ladder: what each rung trains, what it leaves alone, and what comes out of it."""

import copy
import importlib.util
import re

import pytest
import torch
import torch.nn.functional as F
from plans import removing, replacing, tiny_windows
from tiny import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, TrainerCallback

from llm_streamline.arch import find_arch, get_layers, silencing
from llm_streamline.config import TrainingConfig
from llm_streamline.errors import ArchitectureError, ConfigError, MissingExtraError
from llm_streamline.measure.partial import run_tapped
from llm_streamline.plan import Merge, Plan, Remove, Silence
from llm_streamline.replacements.build import build_replacements, install_plan
from llm_streamline.replacements.starts import set_start
from llm_streamline.surgery import apply_plan
from llm_streamline.training.arguments import training_arguments
from llm_streamline.training.heal import Healed, check_healing
from llm_streamline.training.student import Student, hidden_pairs
from llm_streamline.training.trainer import StreamlineTrainer, train_student

TRAIN, VALIDATION = tiny_windows(8), tiny_windows(4, seed=1)
BASE = {"tokens": 4 * 2 * 16, "per_device_train_batch_size": 2, "num_evals": 2, "early_stopping_patience": 0}
RUNGS = ["lora", "head", "above", "norms", "full"]
FAMILIES = ["llama", "gemma2", "gpt2", "opt", "falcon", "mixtral", "bloom", "gemma3"]
SPAN = (2, 5)


def config_of(rung, **changes):
    heal = changes.pop("heal", {})
    return TrainingConfig(
        **(BASE | {"trainable": rung, "heal": {"learning_rate": 1e-2, "untie_head": True} | heal} | changes)
    )


def built(model, plan, config):
    replacements = build_replacements(model, plan)
    for replacement in replacements:
        set_start(replacement, model, replacement.edit.network.init, 0)
    healed = Healed(model, plan, replacements, config, seed=0)
    return Student(model, plan, replacements, config, healed)


def installed(model, plan, student):
    """The model edited and healed in place."""
    install_plan(model, plan, list(student.replacements), student.healed)
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model, plan, config, folder, seed=0):
    student = built(model, plan, config)
    return student, train_student(student, config, TRAIN, VALIDATION, folder, seed)


# --- what is trained


LLAMA_LAYER = {
    "input_layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "post_attention_layernorm.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight",
    "self_attn.q_proj.weight", "self_attn.v_proj.weight",
}  # fmt: skip


def llama_names(rung, positions):
    layers = {f"model.layers.{i}.{name}" for i in positions for name in LLAMA_LAYER}
    if rung == "norms":
        return {name for name in layers if "norm" in name} | {"model.norm.weight"}
    if rung == "head":
        return {n for n in layers if re.match(r"model\.layers\.(3|4)\.", n)} | {"model.norm.weight", "lm_head.weight"}
    if rung == "above":
        return {n for n in layers if int(n.split(".")[2]) >= 2} | {"model.norm.weight"}
    if rung == "full":
        return layers | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    return {name.removesuffix(".weight") + part for name in layers if "proj" in name for part in (".lora_A", ".lora_B")}


@pytest.mark.parametrize("rung", RUNGS)
def test_the_trainable_set_is_exactly_what_the_rung_names(rung):
    model = tiny_model()
    student = built(model, removing(model, *SPAN), config_of(rung, heal={"last_layers": 2}))
    assert student.trained_names == llama_names(rung, range(5))
    assert sum(p.requires_grad for p in student.parameters()) == len(student.trained_names)


@pytest.mark.parametrize("rung", RUNGS)
def test_a_network_is_trained_beside_the_rung_and_no_parameter_twice(rung):
    model = tiny_model()
    student = built(model, replacing(model, *SPAN, init="first"), config_of(rung, heal={"last_layers": 2}))
    network = {f"2:5 layers.0.{name}" for name in LLAMA_LAYER}
    positions = [i for i in range(6) if i != 2]
    healed = llama_names(rung, positions)
    if rung == "head":  # the last two of six
        healed = {n.replace("layers.4.", "layers.5.").replace("layers.3.", "layers.4.") for n in healed}
    assert student.trained_names == healed | network


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rung", RUNGS)
def test_the_trained_parameters_get_gradients_and_nothing_else_does(name, rung):
    model = tiny_model(name)
    student = built(model, removing(model, *SPAN), config_of(rung))
    student(tiny_tokens())["loss"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    without = [key for key, p in student.healed.trained.items() if p.grad is None]
    assert len(without) <= (2 if name == "mixtral" else 0)  # an expert that no token went to
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_full_trains_every_parameter_of_the_decoder_and_leaves_a_vision_tower_alone():
    model = tiny_model("gemma3")
    student = built(model, removing(model, *SPAN), config_of("full", heal={"untie_head": False}))
    assert not any("vision" in name for name in student.trained_names)
    apply_plan(model, removing(model, *SPAN))
    assert student.trained_names == {n for n, _ in model.named_parameters() if ".language_model." in n}


def test_layers_are_chosen_by_place_and_not_by_a_part_of_a_name():
    """Defect D4 of the reference: "layers.2" is in the names of layers 20 to 22 as well."""
    model = tiny_model(num_hidden_layers=24)
    student = built(model, removing(model, 5, 6), config_of("head", heal={"last_layers": 1}))
    assert {n for n in student.trained_names if "layers" in n} == {f"model.layers.22.{n}" for n in LLAMA_LAYER}


def test_targets_restrict_the_adapters():
    model = tiny_model()
    student = built(model, removing(model, *SPAN), config_of("lora", heal={"targets": ("q_proj", "v_proj"), "rank": 3}))
    assert len(student.healed.trained) == 5 * 2 * 2
    assert {min(p.shape) for p in student.healed.trained.values()} == {3}


def test_where_a_linear_map_is_folded_the_projection_is_trained_through_the_map():
    model = tiny_model()
    student = built(model, replacing(model, *SPAN, "linear", init="identity"), config_of("full"))
    assert "model.layers.1.mlp.down_proj.weight" not in student.trained_names
    assert "model.layers.1.mlp.up_proj.weight" in student.trained_names


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("rung", RUNGS)
def test_what_a_plan_silences_stays_silent(name, rung):
    model, edited, ids = tiny_model(name), tiny_model(name), tiny_tokens()
    edits = (Silence(start=2, stop=4, part="attention"), Remove(start=4, stop=6), Silence(start=6, stop=8, part="mlp"))
    plan = Plan(model=removing(model, 4, 6).model, edits=edits)
    apply_plan(edited, plan)
    student = built(model, plan, config_of(rung, objective="lm"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        student(ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = student.token_losses(ids)
    healed = installed(model, plan, student)
    arch, layers, before = find_arch(healed), get_layers(healed), get_layers(edited)
    for position, part in ((2, "attention"), (3, "attention"), (4, "mlp"), (5, "mlp")):
        for key in silencing(layers[position], arch, part):
            assert torch.equal(layers[position].get_parameter(key), before[position].get_parameter(key))
    logits = healed(ids, use_cache=False).logits
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(losses, truth, rtol=1e-4, atol=1e-4)


def test_a_merged_layer_is_healed_from_what_it_was_merged_to():
    model, edited = tiny_model(), tiny_model()
    edit = Merge(start=2, stop=5, weights=(1.0, 0.5, -0.5), norms=(1.0, 0.0, 0.0))
    plan = Plan(model=removing(model, 2, 5).model, edits=(edit,))
    apply_plan(edited, plan)
    student = built(model, plan, config_of("full"))
    before, after = weights(edited), weights(installed(model, plan, student))
    assert all(torch.equal(before[key], after[key]) for key in before)


# --- where it starts


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rung", RUNGS)
def test_step_zero_is_the_edited_model(name, rung):
    model, edited, ids = tiny_model(name), tiny_model(name), tiny_tokens()
    plan = removing(model, *SPAN)
    apply_plan(edited, plan)
    student = built(model, plan, config_of(rung))
    logits = edited(ids, use_cache=False).logits
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(student.token_losses(ids), truth, rtol=1e-6, atol=1e-6)
    before = weights(edited)
    after = weights(installed(model, plan, student))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_adapters_depend_on_the_seed_alone():
    model = tiny_model()
    plan, config = removing(model, *SPAN), config_of("lora")
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(built(model, plan, config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# --- what comes out


@pytest.mark.parametrize("rung", ["lora", "full"])
@pytest.mark.parametrize("kind", ["patch", "bias", "scale"])
def test_repairs_are_healed_and_folded_in_the_right_order(rung, kind):
    model, ids = tiny_model(), tiny_tokens()
    plan = replacing(model, *SPAN, kind, init="identity")
    student = built(model, plan, config_of(rung, objective="lm"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(2):
        student(ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = student.token_losses(ids)
    logits = installed(model, plan, student)(ids, use_cache=False).logits
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(losses, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [None, "layer", "linear", "ffn"])
@pytest.mark.parametrize("rung", RUNGS)
def test_what_is_installed_is_what_was_trained(tmp_path, rung, kind):
    model, ids = tiny_model(), tiny_tokens()
    teacher = weights(model)
    plan = replacing(model, *SPAN, kind, init="identity") if kind else removing(model, *SPAN)
    student, history = trained(model, plan, config_of(rung, objective="lm"), tmp_path)
    assert history["best_step"] > 0
    assert history["trainable"] == rung
    assert all(torch.equal(teacher[name], tensor) for name, tensor in model.state_dict().items())
    losses = student.token_losses(ids)
    logits = installed(model, plan, student)(ids, use_cache=False).logits
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(losses, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rung", RUNGS)
def test_frozen_weights_keep_their_bits_and_trained_ones_move(tmp_path, rung):
    model, edited = tiny_model(), tiny_model()
    plan = removing(model, *SPAN)
    apply_plan(edited, plan)
    before = weights(edited)
    student, _ = trained(model, plan, config_of(rung, objective="lm"), tmp_path)
    after = weights(installed(model, plan, student))
    names = {re.sub(r"\.lora_[AB]$", ".weight", name) for name in student.trained_names}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == names


def test_training_that_hurts_hands_back_the_start(tmp_path):
    model, edited = tiny_model(), tiny_model()
    plan = removing(model, *SPAN)
    apply_plan(edited, plan)
    wild = {"learning_rate": 50.0, "heal": {"learning_rate": 50.0}, "max_grad_norm": 0, "warmup_ratio": 0}
    config = config_of("full", **wild | {"early_stopping_patience": 1, "num_evals": 4})
    student, history = trained(model, plan, config, tmp_path)
    assert [row["step"] for row in history["validation"]] == [0, 1]  # stopped when it hurt
    before, after = weights(edited), weights(installed(model, plan, student))
    assert all(torch.equal(before[name], after[name]) for name in before)


class Killed(Exception):
    pass


@pytest.mark.parametrize("rung", ["lora", "full"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, rung, monkeypatch):
    def run(folder):
        model = tiny_model()
        return trained(model, replacing(model, *SPAN, init="first"), config_of(rung), folder)

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **_):
            raise Killed

    truth, _ = run(tmp_path / "whole")
    original = StreamlineTrainer.__init__

    def with_kill(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Kill())

    with monkeypatch.context() as patch:
        patch.setattr(StreamlineTrainer, "__init__", with_kill)
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    again, _ = run(tmp_path / "killed")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in truth.state_dict().items())


# --- tied heads


def test_a_tied_head_is_refused():
    model = tiny_model("qwen2_tied")
    with pytest.raises(ConfigError, match=r"untie_head: true \(the result has .* parameters more\)"):
        check_healing(model, config_of("head", heal={"untie_head": False}), False)
    check_healing(model, config_of("head"), False)


def test_an_untied_head_is_saved_apart_and_the_config_says_so(tmp_path):
    model = tiny_model("qwen2_tied")
    plan = removing(model, *SPAN)
    embedding = model.get_input_embeddings().weight.clone()
    student, _ = trained(model, plan, config_of("head", objective="lm"), tmp_path / "work")
    assert "lm_head.weight" in student.trained_names
    healed = installed(model, plan, student)
    assert torch.equal(healed.get_input_embeddings().weight, embedding)
    assert not torch.equal(healed.get_output_embeddings().weight, embedding)
    healed.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.tie_word_embeddings is False
    ids = tiny_tokens()
    torch.testing.assert_close(loaded(ids).logits, healed(ids).logits)


def test_full_keeps_a_tied_head_tied(tmp_path):
    model = tiny_model("qwen2_tied")
    plan = removing(model, *SPAN)
    config = config_of("full", heal={"untie_head": False})
    student, _ = trained(model, plan, config, tmp_path)
    assert "lm_head.weight" not in student.trained_names
    healed = installed(model, plan, student)
    assert healed.get_output_embeddings().weight is healed.get_input_embeddings().weight
    ids = tiny_tokens()
    logits = healed(ids, use_cache=False).logits
    truth = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(student.token_losses(ids), truth, rtol=1e-4, atol=1e-4)


# --- objectives


@pytest.mark.parametrize("rung", ["head", "above", "norms"])
def test_sums_of_objectives_are_those_of_the_whole_models(rung):
    """Sharing the prefix must not change a number: the truth runs original and edited model in full."""
    model, ids = tiny_model(), tiny_tokens()
    plan = removing(model, *SPAN)
    objective = {"hidden": 0.3, "lm": 0.5, "kl": 2.0}
    student = built(model, plan, config_of(rung, objective=objective, mse_weighting="uniform", heal={"last_layers": 2}))
    assert student.resume_at == {"head": 2, "above": 2, "norms": 0}[rung]
    edited = copy.deepcopy(model)
    apply_plan(edited, plan)
    with torch.no_grad():
        states, teacher = run_tapped(model, {"input_ids": ids}, range(9))
        own, logits = run_tapped(edited, {"input_ids": ids}, range(6))
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    pairs = [(3, 6), (4, 7), (5, 8)] + ([(1, 1), (2, 2)] if rung == "norms" else [])
    hidden = torch.stack([F.mse_loss(own[mine], states[theirs]) for mine, theirs in pairs]).mean()
    found = student(ids)
    for name, value in {"hidden": hidden, "lm": lm, "kl": kl}.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], 0.3 * hidden + 0.5 * lm + 2 * kl, rtol=1e-4, atol=1e-5)


def test_states_are_matched_by_original_index():
    model = tiny_model()
    assert hidden_pairs(removing(model, 2, 5), []) == {1: 1, 2: 2, 3: 6, 4: 7, 5: 8}
    plan = replacing(model, 2, 5, count=2)
    assert hidden_pairs(plan, build_replacements(model, plan)) == {1: 1, 2: 2, 4: 5, 5: 6, 6: 7, 7: 8}
    plan = replacing(model, 2, 5, "linear", init="identity")
    assert hidden_pairs(plan, build_replacements(model, plan)) == {1: 1, 2: 5, 3: 6, 4: 7, 5: 8}


def test_hidden_states_alone_need_no_head():
    model = tiny_model()
    student = built(model, removing(model, *SPAN), config_of("norms", objective="hidden"))
    handle = model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    student(tiny_tokens())["loss"].backward()
    handle.remove()


def test_the_prefix_is_run_once_where_nothing_in_it_is_trained():
    model = tiny_model()
    student = built(model, removing(model, 5, 7), config_of("head", heal={"last_layers": 2}))
    assert student.resume_at == 4
    called = []
    for index, layer in enumerate(get_layers(model)):
        layer.register_forward_pre_hook(lambda _m, _a, index=index: called.append(index))
    student(tiny_tokens())
    assert called == list(range(8))  # once each, for the original; the trained layers are copies


# --- how it is run


@pytest.mark.parametrize("rung", RUNGS)
def test_checkpointing_changes_memory_and_not_a_gradient(rung):
    model, ids = tiny_model("gemma2"), tiny_tokens()
    found = []
    for switch in (False, True):
        student = built(model, removing(model, *SPAN), config_of(rung, gradient_checkpointing=switch))
        student(ids)["loss"].backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_checkpointing_computes_the_layers_again():
    model = tiny_model()
    counts = []
    for switch in (False, True):
        plan = removing(model, *SPAN)
        student = built(model, plan, config_of("norms", gradient_checkpointing=switch))
        called = []
        for layer in student.healed.patches.values():
            layer.register_forward_pre_hook(lambda *_, called=called: called.append(1))
        student(tiny_tokens())["loss"].backward()
        counts.append(len(called))
    assert counts == [5, 10]


def test_a_network_and_the_originals_weights_have_learning_rates_of_their_own(tmp_path):
    model, config = tiny_model(), config_of("norms", learning_rate=1e-3, weight_decay=0.1, num_evals=0)
    student = built(model, replacing(model, *SPAN, init="first"), config)
    arguments = training_arguments(config, 4, 1, str(tmp_path), 0, torch.device("cpu"))
    groups = StreamlineTrainer(model=student, args=arguments).create_optimizer().param_groups
    healed = {id(p) for p in student.healed.parameters()}
    for group in groups:
        assert {id(p) in healed for p in group["params"]} == {group["lr"] == 1e-2}
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in student.parameters())


def test_a_bfloat16_model_is_healed_in_float32_and_handed_back_in_bfloat16(tmp_path):
    model = tiny_model().bfloat16()
    plan = removing(model, *SPAN)
    for rung in RUNGS:
        one = copy.deepcopy(model)
        student, history = trained(one, plan, config_of(rung, objective="lm"), tmp_path / rung)
        assert {p.dtype for p in student.healed.parameters()} == {torch.float32}
        assert history["best_step"] > 0
        assert {p.dtype for p in installed(one, plan, student).parameters()} == {torch.bfloat16}


# --- what is refused


def test_a_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"llm-streamline\[lora\]"):
        check_healing(tiny_model(), config_of("lora"), False)


def test_projections_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"no projection 'qproj'.*Did you mean 'q_proj'"):
        check_healing(tiny_model(), config_of("lora", heal={"targets": ("qproj",)}), False)


def test_mse_without_a_network_is_refused():
    with pytest.raises(ConfigError, match="use hidden"):
        check_healing(tiny_model(), config_of("norms", objective="mse"), False)
    check_healing(tiny_model(), config_of("norms", objective="mse"), True)


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(ArchitectureError, match="offloaded"):
        check_healing(tiny_model().to("meta"), config_of("full"), False)


def test_hidden_states_need_a_layer_above_what_is_trained():
    model = tiny_model()
    with pytest.raises(ConfigError, match="no state to compare"):
        built(model, removing(model, 5, 8), config_of("head", objective="hidden", heal={"last_layers": 0}))
