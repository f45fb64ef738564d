"""A whole `compress` in about two seconds, what of it must be the same bits each time, and runs that end badly.

Used by the tests of resuming and by benchmarks/kill.py.
"""

import hashlib
import io
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from folders import tiny_folder

from llm_streamline import proof
from llm_streamline.config import load_recipe
from llm_streamline.errors import StreamlineError
from llm_streamline.evaluation.result import Results
from llm_streamline.pipeline import compress
from llm_streamline.reload import answer

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wise owls watch from an old oak tree"
RECIPE = """
text: {seq_len: 32}
target: {layers: 1}
calibration: {tokens: 256, batch_tokens: 128}
selection: {verify: 2, verify_tokens: 64}
replacement: {fit_tokens: 128}
training: {tokens: 512, num_evals: 4, validation_tokens: 64, early_stopping_patience: 0, per_device_train_batch_size: 2}
evaluation: {limit: 4, tokens: 2048, speed: false, max_new_tokens: 4, bootstrap: 20, samples: 0}
"""


def make_place(folder: Path) -> Path:
    """A folder with a random model, a text and a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    words = SENTENCE.split()
    draw = random.Random(0)
    text = [" ".join(draw.choices(words, k=90)) + f" number {i}." for i in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": passage}) + "\n" for passage in text))
    (folder / "recipe.yaml").write_text(RECIPE)
    tiny_folder(folder / "model", num_hidden_layers=4)
    return folder


def run(place: Path, out: Path, **more) -> None:
    """The small run, or what is left of it; the proof's fresh process would take longer than all else."""
    before, proof._run_child = proof._run_child, lambda folder: answer(folder)
    try:
        overrides = {"text.sources": [str(place / "text.jsonl")], **more.pop("overrides", {})}
        compress(str(place / "model"), out, load_recipe(place / "recipe.yaml", overrides), **more)
    finally:
        proof._run_child = before


def bits(out: Path) -> dict[str, object]:
    """All that must not depend on how often a run was stopped: the checkpoint, statistics, plan and results."""
    tool = out / "streamline"
    plain = [path for path in out.iterdir() if path.is_file() and path.name != "README.md"]
    plain += [tool / "stats.safetensors", tool / "plan.json", tool / "recipe.yaml", *sorted(tool.glob("items/*/*"))]
    found: dict[str, object] = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in plain
    }
    found["results"] = Results.load(tool / "results.json").without_times()
    for model in found["results"]["models"]:
        del model["source"]  # where it lay
    history = json.loads((tool / "training.json").read_text())
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in history["steps"]]
    return found | {"steps": rows, "validation": history["validation"], "best": history["best_step"]}


def attempt(place: Path, out: Path) -> None:
    """The small run as the command line ends it: one sentence and an exit code for what the user can mend."""
    try:
        run(place, out)
    except StreamlineError as problem:
        print(f"{type(problem).__name__}: {problem}")
        raise SystemExit(problem.exit_code) from None


def in_child(action: Callable[[], None], stdout: Path | None = None) -> int:
    """Fork, do `action` there, and return the child's process id; its output goes to a file. It exits with 0 or 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(stdout or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        action()
        code = 0
    except SystemExit as leaving:
        if not isinstance(leaving.code, int):
            print(leaving.code)
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a child; minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
