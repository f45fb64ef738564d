"""A training that is told to stop, finds no memory, or finds its checkpoints damaged ends with the same bits."""

import os
import signal

import pytest
import torch
from test_training_trainer import STEPS, KillAfter, Killed, bits, logs_of, run, same

from llm_streamline import interrupt
from llm_streamline.errors import OutOfMemoryError, OutputError
from llm_streamline.training import checkpoints
from llm_streamline.training.checkpoints import is_sound, last_checkpoint, seal
from llm_streamline.training.student import Student

FORWARD = Student.forward


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    student, history = run(tmp_path_factory.mktemp("undisturbed"))
    return bits(student), history


def is_the_same(found, truth):
    student, history = found
    assert same(bits(student), truth[0])
    assert logs_of(history) == logs_of(truth[1])
    rows = [[(r["step"], r["loss"], r["lm_loss"]) for r in one["validation"]] for one in (history, truth[1])]
    assert rows[0] == rows[1]


def signal_at(monkeypatch, call, *, training):
    """Send SIGTERM to ourselves in the given forward of training, or of validation."""
    seen = []

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled() == training:
            seen.append(1)
            if len(seen) == call:
                os.kill(os.getpid(), signal.SIGTERM)
        return FORWARD(self, *args, **kwargs)

    monkeypatch.setattr(Student, "forward", forward)


# --- told to stop


@pytest.mark.parametrize(
    ("call", "training", "step"), [(8, True, 7), (1, True, None), (9, False, 6), (2, False, None), (12, True, 11)]
)
def test_a_signal_ends_with_a_checkpoint_of_the_last_step(undisturbed, tmp_path, monkeypatch, call, training, step):
    """Three forwards a validation: the ninth is in the middle of that of step 6."""
    signal_at(monkeypatch, call, training=training)
    with interrupt.watched(), pytest.raises(interrupt.Stopped) as stopped:
        run(tmp_path)
    assert (stopped.value.name, stopped.value.exit_code) == ("SIGTERM", 143)
    found = last_checkpoint(tmp_path)
    assert found is None if step is None else found.name == f"checkpoint-{step}"
    is_the_same(run(tmp_path), undisturbed)


def test_a_signal_between_the_batches_of_one_step_forgets_that_step(tmp_path, monkeypatch):
    wishes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    truth = run(tmp_path / "a", **wishes)
    signal_at(monkeypatch, 10, training=True)
    with interrupt.watched(), pytest.raises(interrupt.Stopped):
        run(tmp_path / "b", **wishes)
    assert last_checkpoint(tmp_path / "b").name == "checkpoint-4"
    is_the_same(run(tmp_path / "b", **wishes), (bits(truth[0]), truth[1]))


def test_a_log_of_means_over_steps_is_the_same_too(tmp_path, monkeypatch):
    wishes = {"arguments": {"logging_steps": 5}}
    truth = run(tmp_path / "a", **wishes)
    signal_at(monkeypatch, 9, training=True)
    with interrupt.watched(), pytest.raises(interrupt.Stopped):
        run(tmp_path / "b", **wishes)
    is_the_same(run(tmp_path / "b", **wishes), (bits(truth[0]), truth[1]))


# --- checkpoints


def test_checkpoints_are_written_in_between_and_only_the_newest_kept(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SAVE_SECONDS", -1.0)
    with pytest.raises(Killed):
        run(tmp_path, callback=KillAfter(8))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-7", "checkpoint-8"}
    is_the_same(run(tmp_path), undisturbed)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "best.safetensors", "history.json"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(undisturbed, tmp_path, caplog, name):
    with pytest.raises(Killed):
        run(tmp_path, callback=KillAfter(9))
    path = tmp_path / "checkpoint-9" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # a second name of the same file in an older checkpoint is not damaged with it
    path.write_bytes(content)
    found = run(tmp_path)
    assert "checkpoint-9 is damaged or half-written: deleted" in caplog.text
    is_the_same(found, undisturbed)


def test_order_is_told_by_steps_and_not_by_times(tmp_path):
    for step, when in ((9, 100), (10, 50), (2, 10**9)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "x").write_text(str(step))
        seal(folder)
        os.utime(folder, (when, when))
    checkpoints.keep_newest(tmp_path)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-2").exists()
    assert is_sound(tmp_path / "checkpoint-9")


def test_a_full_disk_leaves_the_checkpoint_before(undisturbed, tmp_path, monkeypatch):
    def full(folder):
        if folder.name == "checkpoint-9":
            raise OutputError("the disk is full")
        seal(folder)

    monkeypatch.setattr("llm_streamline.training.trainer.seal", full)
    with pytest.raises(OutputError, match="the disk is full"):
        run(tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    monkeypatch.undo()
    is_the_same(run(tmp_path), undisturbed)


# --- no memory


def no_room(monkeypatch, largest, problem, after=0):
    """From forward number `after` on, batches above `largest` find no memory."""
    calls = []

    def forward(self, input_ids, *args, **kwargs):
        calls.append(len(input_ids))
        if len(calls) > after and len(input_ids) > largest:
            raise problem
        return FORWARD(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Student, "forward", forward)
    return calls


PROBLEMS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]
WISHES = {"per_device_train_batch_size": 4, "tokens": STEPS * 4 * 16}


@pytest.mark.parametrize(("problem", "after"), [(PROBLEMS[0], 0), (PROBLEMS[1], 9)], ids=["at once", "in the middle"])
def test_without_memory_the_batch_is_halved_and_the_steps_stay(tmp_path, monkeypatch, caplog, problem, after):
    truth = run(tmp_path / "a", **WISHES)
    calls = no_room(monkeypatch, 1, problem, after)
    student, history = run(tmp_path / "b", **WISHES)
    assert "going on with 2 windows at once, accumulated 2 times" in caplog.text
    assert "going on with 1 windows at once, accumulated 4 times" in caplog.text
    assert max(calls[after + 12 :]) == 1
    assert history["windows_at_once"] == 1
    assert history["tokens"] == truth[1]["tokens"]
    for mine, theirs in zip(history["steps"], truth[1]["steps"], strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name, value in bits(truth[0]).items():
        torch.testing.assert_close(bits(student)[name], value, rtol=1e-3, atol=2e-5)


def test_without_memory_for_one_window_there_is_one_sentence(tmp_path, monkeypatch):
    no_room(monkeypatch, 0, PROBLEMS[0])
    with pytest.raises(OutOfMemoryError, match=r"shorten text\.seq_len"):
        run(tmp_path)


def test_other_errors_are_not_taken_for_it(tmp_path, monkeypatch):
    no_room(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(tmp_path)
