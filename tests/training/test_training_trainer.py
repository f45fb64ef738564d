"""The loop: schedule, groups, best state, early stop, and runs that were killed."""

import math
import shutil

import pytest
import torch
from plans import replacing, tiny_windows
from tiny import tiny_model
from transformers import TrainerCallback

from llm_streamline.config import TrainingConfig
from llm_streamline.data.windows import Windows
from llm_streamline.errors import NumericsError
from llm_streamline.replacements.build import build_replacements
from llm_streamline.replacements.starts import set_start
from llm_streamline.runtime import seed_everything
from llm_streamline.training import trainer as trainer_module
from llm_streamline.training.arguments import training_arguments
from llm_streamline.training.checkpoints import last_checkpoint
from llm_streamline.training.student import Student
from llm_streamline.training.trainer import StreamlineTrainer, train_student

TRAIN, VALIDATION = tiny_windows(24), tiny_windows(6, seed=1)
STEPS, SPAN = 12, (3, 6)
BASE = {"tokens": STEPS * 2 * 16, "per_device_train_batch_size": 2, "num_evals": 4, "early_stopping_patience": 0}


class Killed(Exception):
    pass


def student_for(config, init="first", kind="layer"):
    model = tiny_model()
    plan = replacing(model, *SPAN, kind, init=init)
    replacements = build_replacements(model, plan)
    for replacement in replacements:
        set_start(replacement, model, init, 0)
    return Student(model, plan, replacements, config)


def run(folder, seed=0, init="first", kind="layer", callback=None, **changes):
    config = TrainingConfig(**(BASE | changes))
    seed_everything(seed)
    student = student_for(config, init, kind)
    original = StreamlineTrainer.__init__
    if callback is not None:  # as a kill at a chosen moment would

        def with_callback(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(callback)

        StreamlineTrainer.__init__ = with_callback
    try:
        history = train_student(student, config, TRAIN, VALIDATION, folder, seed)
    finally:
        StreamlineTrainer.__init__ = original
    return student, history


def bits(student):
    return {name: tensor.clone() for name, tensor in student.replacements.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    student, history = run(tmp_path_factory.mktemp("undisturbed"))
    return bits(student), history


class Recorder(TrainerCallback):
    """The learning rate that each optimiser step really uses."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


# --- the schedule and the optimiser


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("warmup", "lowest"), [(0.0, 0.0), (0.25, 1e-4)])
def test_the_schedule_counts_optimiser_steps(tmp_path, warmup, lowest, accumulation):
    """Defect D7 of the reference: totals in micro-steps, so the cosine ended at 12 % or climbed back."""
    recorder, peak = Recorder(), 1e-3
    run(
        tmp_path, callback=recorder, warmup_ratio=warmup, min_learning_rate=lowest, learning_rate=peak, num_evals=0,
        gradient_accumulation_steps=accumulation, tokens=STEPS * 2 * 16 * accumulation,
    )  # fmt: skip
    rates = [group[0] for group in recorder.rates]
    assert len(rates) == STEPS
    warm = round(warmup * STEPS)

    def expected(step):
        if step < warm:
            return peak * step / warm
        progress = (step - warm) / (STEPS - warm)
        return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2

    assert rates == pytest.approx([expected(step) for step in range(STEPS)])


def test_norms_and_biases_are_never_decayed(tmp_path):
    """Defect D25 of the reference."""
    config = TrainingConfig(**(BASE | {"num_evals": 0}), weight_decay=0.5)
    for kind in ("layer", "ffn"):
        student = student_for(config, "identity", kind)
        device = torch.device("cpu")
        arguments = training_arguments(config, 3, 1, str(tmp_path), 0, device)
        optimizer = StreamlineTrainer(model=student, args=arguments).create_optimizer()
        decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
        assert {p.ndim for p in decay[0.5]} == {2}
        assert {p.ndim for p in decay[0.0]} == {1}
        count = sum(len(group) for group in decay.values())
        assert count == sum(p.requires_grad for p in student.parameters())


def test_accumulated_batches_take_the_step_of_the_large_batch(tmp_path):
    whole, _ = run(
        tmp_path / "a", tokens=4 * 16, per_device_train_batch_size=4, num_evals=0, warmup_ratio=0, objective="mse"
    )
    parts, _ = run(
        tmp_path / "b", tokens=4 * 16, per_device_train_batch_size=1, gradient_accumulation_steps=4, num_evals=0,
        warmup_ratio=0, objective="mse",
    )  # fmt: skip
    for name, value in bits(whole).items():
        torch.testing.assert_close(bits(parts)[name], value, rtol=1e-3, atol=1e-5)


# --- what is kept


def test_training_lowers_the_loss_and_keeps_the_best_state(undisturbed):
    state, history = undisturbed
    losses = {row["step"]: row["lm_loss"] for row in history["validation"]}
    assert set(losses) == {0, 3, 6, 9, 12}
    assert history["best_step"] == min(losses, key=losses.get)
    assert history["objective"] == {"kl": 1.0}
    assert history["tokens"] == BASE["tokens"]
    config = TrainingConfig(**BASE)
    student = student_for(config)
    student.replacements.load_state_dict(state)
    found = student.token_losses(VALIDATION.input_ids).mean()
    assert float(found) == pytest.approx(losses[history["best_step"]], abs=1e-5)


def test_a_validation_counts_every_window_once(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "VALIDATION", tiny_windows(3, seed=1))  # the last batch is half a batch
    config = TrainingConfig(**BASE)
    truth = float(student_for(config).token_losses(VALIDATION.input_ids).mean())
    _, history = run(tmp_path, tokens=32, num_evals=0)
    assert history["validation"][0]["lm_loss"] == pytest.approx(truth, rel=1e-6)


def test_the_mse_falls(tmp_path):
    _, history = run(tmp_path, objective="mse", tokens=60 * 32, learning_rate=3e-3)
    rows = history["validation"]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.fixture
def _start_is_best(monkeypatch):
    """Text that the model itself would write, and a span of one layer: the copy it starts as cannot be bettered."""
    ids, model = tiny_windows(6, 1).input_ids.long(), tiny_model()
    for _ in range(15):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    monkeypatch.setitem(globals(), "VALIDATION", Windows(input_ids=ids.int()))
    monkeypatch.setitem(globals(), "SPAN", (3, 4))


WILD = {"learning_rate": 0.5, "warmup_ratio": 0, "max_grad_norm": 0}


@pytest.mark.usefixtures("_start_is_best")
def test_an_absurd_learning_rate_returns_the_start(tmp_path):
    """Step 0 is a candidate, and the best state is a copy that later steps do not touch (defect D6)."""
    start = bits(student_for(TrainingConfig(**BASE)))
    student, history = run(tmp_path, **WILD)
    assert history["best_step"] == 0
    assert len(history["validation"]) == 5
    assert same(bits(student), start)


def test_the_best_state_is_a_deep_copy(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **_):
            seen[state.global_step] = {n: t.clone() for n, t in model.replacements.state_dict().items()}

    student, history = run(tmp_path, callback=Watch(), learning_rate=3e-3, tokens=STEPS * 32)
    assert same(bits(student), seen[history["best_step"]])


@pytest.mark.usefixtures("_start_is_best")
def test_training_stops_when_it_hurts(tmp_path):
    student, history = run(tmp_path, **WILD, early_stopping_patience=2, num_evals=12)
    assert [row["step"] for row in history["validation"]] == [0, 1, 2]
    assert history["tokens"] == 2 * 32
    assert same(bits(student), bits(student_for(TrainingConfig(**BASE))))


def test_a_loss_that_is_no_number_stops_the_run_in_one_sentence(tmp_path, monkeypatch):
    forward = Student.forward

    def poisoned(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        return outputs | {"loss": outputs["loss"] * float("nan")} if torch.is_grad_enabled() else outputs

    monkeypatch.setattr(Student, "forward", poisoned)
    with pytest.raises(NumericsError, match="the training loss became nan at step 0; lower"):
        run(tmp_path)


def test_few_windows_are_repeated(tmp_path):
    _, history = run(tmp_path, tokens=48 * 16, num_evals=0)
    assert history["passes"] == 2.0


# --- the same bits


def test_the_same_seed_gives_the_same_bits(undisturbed, tmp_path):
    state, history = undisturbed
    student, again = run(tmp_path)
    assert same(bits(student), state)
    for one, other in zip(history["steps"], again["steps"], strict=True):
        assert one["loss"] == other["loss"]


def test_another_seed_takes_another_order(undisturbed, tmp_path):
    _, history = run(tmp_path, seed=1)
    assert [row["loss"] for row in history["steps"]] != [row["loss"] for row in undisturbed[1]["steps"]]


class KillAfter(TrainerCallback):
    """Ends the process, as it were, at the end of a step, after its checkpoint if there is one."""

    def __init__(self, step, before_saving=False):
        self._step, self._before_saving = step, before_saving

    def on_save(self, args, state, control, **_):
        if state.global_step == self._step and not self._before_saving:
            raise Killed

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self._step and self._before_saving:
            raise Killed


def logs_of(history):
    return [(row["step"], row["loss"], row["lr"]) for row in history["steps"]]


@pytest.mark.parametrize(
    "callback", [KillAfter(6), KillAfter(8, True), KillAfter(2, True), KillAfter(12)], ids=["6", "8", "2", "12"]
)
def test_a_killed_run_goes_on_to_the_same_bits(undisturbed, tmp_path, callback):
    with pytest.raises(Killed):
        run(tmp_path, callback=callback)
    student, history = run(tmp_path)
    assert same(bits(student), undisturbed[0])
    assert logs_of(history) == logs_of(undisturbed[1])
    assert [(r["step"], r["lm_loss"]) for r in history["validation"]] == [
        (r["step"], r["lm_loss"]) for r in undisturbed[1]["validation"]
    ]


@pytest.mark.parametrize("missing", ["trainer_state.json", "truncated"])
def test_a_half_written_checkpoint_is_deleted_and_the_one_before_it_used(undisturbed, tmp_path, missing):
    with pytest.raises(Killed):
        run(tmp_path, callback=KillAfter(9))
    half = tmp_path / "checkpoint-9"
    if missing == "truncated":
        (half / "trainer_state.json").write_text('{"epoch": 0.')
    else:
        (half / missing).unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    assert not half.exists()
    student, history = run(tmp_path)
    assert same(bits(student), undisturbed[0])
    assert logs_of(history) == logs_of(undisturbed[1])


def test_a_run_killed_between_validation_and_checkpoint_forgets_the_later_validation(undisturbed, tmp_path):
    class KillInSave(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            if state.global_step == 9:
                raise Killed

    with pytest.raises(Killed):
        run(tmp_path, callback=KillInSave())
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    student, history = run(tmp_path)
    assert same(bits(student), undisturbed[0])
    assert logs_of(history) == logs_of(undisturbed[1])


@pytest.mark.usefixtures("_start_is_best")
def test_a_run_that_stopped_early_and_was_killed_does_not_train_on(tmp_path):
    wild = {**WILD, "early_stopping_patience": 2, "num_evals": 12}
    _, truth = run(tmp_path / "whole", **wild)
    _, again = run(tmp_path / "whole", **wild)  # everything was written but the result was not taken
    assert [row["step"] for row in again["validation"]] == [row["step"] for row in truth["validation"]]
    assert again["best_step"] == truth["best_step"] == 0
    assert again["tokens"] == truth["tokens"] == 2 * 32


def test_no_checkpoint_is_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    assert last_checkpoint(tmp_path) is None
    shutil.rmtree(tmp_path)
    assert last_checkpoint(tmp_path) is None


def test_checkpoints_hold_the_replacement_alone(tmp_path):
    run(tmp_path)
    model = sum(p.numel() for p in tiny_model().model.layers[3].parameters())
    from safetensors import safe_open

    with safe_open(last_checkpoint(tmp_path) / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == model  # noqa: SIM118
    assert trainer_module.WindowDataset(TRAIN)[3]["input_ids"].shape == (16,)
