"""Kernels, compiled networks, packed weights: refused early where they cannot be, the same where they can."""

import functools
import importlib.util

import pytest
import torch
from folders import tiny_folder
from plans import replacing, tiny_windows
from small_run import bits, make_place, run
from tiny import tiny_model

from llm_streamline import engines
from llm_streamline.arch import get_layers
from llm_streamline.config import Recipe, TrainingConfig, load_recipe
from llm_streamline.engines import check_engines
from llm_streamline.errors import ConfigError, MissingExtraError
from llm_streamline.packed import is_packed, num_numbers, plain_copy
from llm_streamline.replacements.build import build_replacements
from llm_streamline.replacements.starts import set_start
from llm_streamline.sources import load_model, resolve_model
from llm_streamline.stages.checks import check_early
from llm_streamline.training.compiled import compiled
from llm_streamline.training.student import Student

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def _no_packages(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda _name: None)


@pytest.mark.usefixtures("_no_packages")
def test_packages_that_are_missing_name_what_to_install(monkeypatch):
    with pytest.raises(MissingExtraError, match=r'pip install "llm-streamline\[quantization\]"'):
        check_engines(Recipe(quantization="4bit", device="cpu"))
    monkeypatch.setattr(engines, "pick_device", lambda _name: torch.device("cuda"))
    with pytest.raises(MissingExtraError, match="flash-attn"):
        check_engines(Recipe(attn_implementation="flash_attention_2"))


def test_what_the_machine_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="needs a CUDA device, this run is on cpu; use sdpa"):
        check_engines(Recipe(attn_implementation="flash_attention_2", device="cpu"))
    monkeypatch.setattr(engines.shutil, "which", lambda _name: None)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        check_engines(Recipe(training={"torch_compile": True}, device="cpu"))
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="trains the original's own weights, which are packed"):
        check_engines(Recipe(quantization="8bit", training={"trainable": "norms"}, device="cpu"))
    monkeypatch.setattr(engines, "pick_device", lambda _name: torch.device("cuda"))
    with pytest.raises(ConfigError, match="has no float32"):
        check_engines(Recipe(attn_implementation="flash_attention_2", dtype="float32"))


def test_arguments_that_the_trainer_does_not_know_are_refused_before_anything_is_loaded(tmp_path):
    source = resolve_model(str(tiny_folder(tmp_path / "model", num_hidden_layers=8)))
    wrong = {"device": "cpu", "training.arguments": {"learning_speed": 3}}
    with pytest.raises(ConfigError, match=r"training\.arguments: .*learning_speed"):
        check_early(source, load_recipe(None, wrong), with_text=False)
    check_early(source, load_recipe(None, wrong | {"training.tokens": 0}), with_text=False)


def test_the_default_needs_nothing():
    check_engines(Recipe(device="cpu"))
    assert engines.loading_options("auto", "none", torch.float32) == {}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_kernel_is_the_one_asked_for_and_changes_nothing_but_rounding(tmp_path, kernel):
    source = resolve_model(tiny_folder(tmp_path / "model"))
    ids = torch.arange(3, 23).view(1, 20)
    chosen = load_model(source, "float32", "cpu", attention=kernel).model
    assert chosen.config._attn_implementation == kernel
    with torch.no_grad():
        torch.testing.assert_close(chosen(ids).logits, load_model(source, "float32", "cpu").model(ids).logits)


def test_another_kernel_is_another_run(tmp_path, caplog):
    """Its numbers round otherwise, so nothing of the run before is taken; the file that is saved does not name it."""
    place = make_place(tmp_path / "place")
    run(place, tmp_path / "out")
    before = bits(tmp_path / "out")
    with caplog.at_level("INFO", logger="llm_streamline"):
        run(place, tmp_path / "out", overrides={"attn_implementation": "eager"})
    assert "similarities: measured before" not in caplog.text
    after = bits(tmp_path / "out")
    assert after["config.json"] == before["config.json"]
    assert before.keys() == after.keys()


# --- compiled networks


def student_and_loss(wrap):
    model = tiny_model()
    plan = replacing(model, 3, 6, "layer", init="first")
    replacements = build_replacements(model, plan)
    for replacement in replacements:
        set_start(replacement, model, "first", 0)
    student = Student(model, plan, replacements, TrainingConfig(objective="kl"))
    with wrap(replacements):
        loss = student(tiny_windows(4).input_ids)["loss"]
        loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return replacements, loss.detach(), gradients


def test_compiled_networks_give_the_same_loss_and_gradients(monkeypatch):
    import contextlib

    traced = []

    def compile_by_tracing(function):  # the code generator takes a minute; what goes wrong goes wrong in the tracing
        traced.append(function)
        return functools.partial(torch_compile, backend="aot_eager")(function)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_by_tracing)
    _, loss, gradients = student_and_loss(lambda _replacements: contextlib.nullcontext())
    replacements, compiled_loss, compiled_gradients = student_and_loss(compiled)
    assert len(traced) == 1
    torch.testing.assert_close(compiled_loss, loss)
    assert compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient)
    assert all("forward" not in vars(m) for r in replacements for m in r.patches().values())


# --- packed weights


def test_what_is_not_packed_is_copied_as_it_is():
    layer = get_layers(tiny_model())[0]
    assert not is_packed(layer)
    clone = plain_copy(layer)
    for mine, theirs in zip(clone.parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine is not theirs
        assert num_numbers(mine) == mine.numel()


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "largest"), [("8bit", 0.02), ("4bit", 0.2)])
def test_a_packed_layer_is_unpacked_to_nearly_the_original(tmp_path, kind, largest):
    source = resolve_model(tiny_folder(tmp_path / "model", **WIDE))
    plain = load_model(source, "float32", "cpu").model
    packed = load_model(source, "float32", "cpu", quantization=kind).model
    assert is_packed(packed)
    assert sum(map(num_numbers, packed.parameters())) == sum(map(num_numbers, plain.parameters()))
    theirs = dict(get_layers(plain)[1].named_parameters())
    clone = plain_copy(get_layers(packed)[1])
    assert not is_packed(clone)
    for name, mine in clone.named_parameters():
        assert mine.shape == theirs[name].shape
        assert (mine - theirs[name]).abs().max() <= largest * theirs[name].abs().max()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_run_on_packed_weights_is_cut_from_the_originals_own(tmp_path, kind):
    place, out = make_place(tmp_path / "place"), tmp_path / "out"
    tiny_folder(place / "model", num_hidden_layers=4, **WIDE)
    run(place, out, overrides={"quantization": kind})
    original = resolve_model(place / "model")
    before = load_model(original, "float32", "cpu").model
    after = load_model(resolve_model(out), "float32", "cpu").model
    plan = load_recipe(out / "streamline" / "recipe.yaml")
    assert plan.quantization == kind
    sources = _sources(out)
    kept = [(new, old) for new, old in enumerate(sources) if old is not None]
    assert len(kept) == 2
    for new, old in kept:
        for mine, theirs in zip(get_layers(after)[new].parameters(), get_layers(before)[old].parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert "quantization_config" not in (out / "config.json").read_text()


def _sources(out):
    """Original index of each layer of the result; None for the network."""
    from llm_streamline.plan import Plan

    plan = Plan.load(out / "streamline" / "plan.json")
    edit = plan.edits[0]
    return [*range(edit.start), None, *range(edit.stop, plan.model.num_layers)]
