"""Several processes at one run, against one: gloo on the CPU, started by torchrun and accelerate as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from folders import tiny_folder

from llm_streamline import proof, ranks
from llm_streamline.config import TrainingConfig, load_recipe
from llm_streamline.evaluation.result import Results
from llm_streamline.files import write_text
from llm_streamline.measure.files import Statistics
from llm_streamline.pipeline import compress
from llm_streamline.plan import Plan
from llm_streamline.reload import answer
from llm_streamline.training.trainer import share_step

ROOT = Path(__file__).parents[1]
RECIPE = """
device: cpu
target: {layers: 2}
text: {seq_len: 32}
calibration: {tokens: 352, batch_tokens: 64}
selection: {verify: 2, verify_tokens: 160}
replacement: {fit_tokens: 256}
training:
  {tokens: 1024, num_evals: 2, validation_tokens: 160, per_device_train_batch_size: 4, gradient_accumulation_steps: 2}
evaluation: {limit: 5, tokens: 8192, speed: false, max_new_tokens: 4, bootstrap: 20, samples: 0}
"""
SENTENCE = "the quick brown fox jumps over a lazy dog while seven wise owls watch from an old oak tree"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    words = SENTENCE.split()
    text = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 90)) + f" number {i}." for i in range(400)]
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": passage}) + "\n" for passage in text)
    (folder / "recipe.yaml").write_text(RECIPE)
    tiny_folder(folder / "model", num_hidden_layers=6)
    return folder


@pytest.fixture(scope="module")
def alone(place):
    return run_alone(place, place / "alone")


def run_alone(place, out, **overrides):
    """The run of one process."""

    def answer_here(command, **_):
        answer(Path(command[-1]))
        return SimpleNamespace(returncode=0, stderr="")

    patch = pytest.MonkeyPatch()
    patch.setattr(proof.subprocess, "run", answer_here)
    try:
        recipe = load_recipe(place / "recipe.yaml", {"text.sources": [str(place / "text.jsonl")], **overrides})
        return compress(str(place / "model"), out, recipe).out
    finally:
        patch.undo()


def launch(num_ranks, place, out, *arguments, launcher=None, **environment):
    """Start the command on several ranks; returns exit code, stdout and stderr."""
    launcher = launcher or ["torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
    options = ["--recipe", place / "recipe.yaml", "--text", place / "text.jsonl", "-o", out]
    words = arguments or ("compress", place / "model", *options)
    script = str(ROOT / "tests" / "rank_script.py")
    command = [sys.executable, "-m", *launcher, script, *map(str, words)]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=540)


def check_same(one, several):
    """Statistics, plan, loss curve and results of a run on several ranks are those of the run of one process."""
    folders = [path / "streamline" for path in (one, several)]
    stats = [Statistics.load(folder) for folder in folders]
    for name, tensor in stats[0].sums.tensors().items():
        torch.testing.assert_close(stats[1].sums.tensors()[name], tensor, rtol=1e-9, atol=1e-9)
    assert stats[0].info.num_tokens == stats[1].info.num_tokens == 352
    assert Plan.load(folders[0] / "plan.json") == Plan.load(folders[1] / "plan.json")
    logs = [json.loads((folder / "training.json").read_text()) for folder in folders]
    assert len(logs[0]["steps"]) == len(logs[1]["steps"]) == 4  # 1024 tokens in steps of eight windows of 32
    for mine, theirs in zip(logs[0]["steps"], logs[1]["steps"], strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["lr"] == theirs["lr"]
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    for mine, theirs in zip(logs[0]["validation"], logs[1]["validation"], strict=True):
        assert mine["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=1e-4)
    results = [Results.load(folder / "results.json") for folder in folders]
    for mine, theirs in zip(results[0].models, results[1].models, strict=True):
        assert mine.size == theirs.size
        for a, b in zip(mine.perplexity, theirs.perplexity, strict=True):
            assert (a.num_windows, a.num_tokens, a.data_hash) == (b.num_windows, b.num_tokens, b.data_hash)
            assert a.nll == pytest.approx(b.nll, abs=1e-6)
        for a, b in zip(mine.tasks, theirs.tasks, strict=True):
            assert (a.acc, a.acc_norm) == (b.acc, b.acc_norm)
    assert results[0].models[0].tasks[0].acc is not None
    for a, b in zip(results[0].comparisons[0].divergence, results[1].comparisons[0].divergence, strict=True):
        assert a.num_tokens == b.num_tokens
        assert a.kl_mean == pytest.approx(b.kl_mean, abs=1e-6)


# --- two ranks


@pytest.fixture(scope="module")
def two(place):
    out = place / "two"
    return out, launch(2, place, out)


def test_two_ranks_give_what_one_gives(alone, two):
    out, process = two
    assert process.returncode == 0, process.stderr
    check_same(alone, out)


def test_rank_0_speaks_for_all(two):
    _, process = two
    assert process.stderr.count("measuring similarities") == 1
    assert process.stderr.count("saving and proving the checkpoint") == 1
    assert process.stdout.count("checkpoint:") == 1
    assert "Traceback" not in process.stderr


def _files(out):
    """Names of the run's files without its working files; a folder called like the run goes by `RUN`."""
    names = (path.relative_to(out).parts for path in out.rglob("*") if path.is_file())
    return {tuple("RUN" if part == out.name else part for part in name) for name in names if "work" not in name}


def test_no_rank_leaves_files_of_its_own(alone, two):
    out, _ = two
    assert _files(out) == _files(alone)


def test_a_rank_that_fails_ends_all_with_one_message(place):
    process = launch(2, place, place / "failed", FAIL_RANK="1")
    assert process.returncode != 0
    assert process.stderr.count("NumericsError: layer 3 is not finite on this rank alone") == 1
    assert "gloo" not in process.stderr  # what the other rank sees of it is not told


@pytest.mark.slow
def test_four_ranks_give_what_one_gives(alone, place):
    out = place / "four"
    process = launch(4, place, out)
    assert process.returncode == 0, process.stderr
    check_same(alone, out)


@pytest.mark.slow
def test_a_refused_input_is_told_once_and_leaves_nothing(place):
    out = place / "refused"
    options = ("--text", place / "missing.txt", "--seq-len", 32, "--device", "cpu")
    words = ("compress", place / "model", "-o", out, *options)
    process = launch(2, place, out, *words)
    assert process.returncode != 0
    assert process.stderr.count("TextError") == 1
    assert not out.exists()


@pytest.mark.slow
def test_accelerate_starts_the_same_run(alone, place):
    out = place / "accelerate"
    config = ROOT / "recipes" / "accelerate" / "cpu_2.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    process = launch(2, place, out, launcher=launcher)
    assert process.returncode == 0, process.stderr
    check_same(alone, out)


@pytest.mark.slow
def test_a_teacher_that_is_split_teaches_the_same(place):
    """The layers above the network then stay as they are, as `auto` says."""
    alone = run_alone(place, place / "alone-narrow", **{"training.trainable": "replacement"})
    out = place / "split"
    process = launch(
        2, place, out, ACCELERATE_USE_FSDP="true"
    )  # what accelerate sets for recipes/accelerate/fsdp2.yaml
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("is split over 2 processes") == 1
    check_same(alone, out)


@pytest.mark.slow
def test_commands_of_the_line_share_their_work_too(alone, place):
    out, options = place / "analyzed", ["--recipe", place / "recipe.yaml", "--text", place / "text.jsonl"]
    process = launch(2, place, out, "analyze", place / "model", "-o", out, *options, "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["num_tokens"] == 352
    both = [Statistics.load(folder).similarity for folder in (alone, out)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-9, atol=1e-9)
    trained, plan = place / "trained", alone / "streamline" / "plan.json"
    process = launch(2, place, trained, "train", plan, place / "model", "-o", trained, *options)
    assert process.returncode == 0, process.stderr
    logs = [json.loads((f / "streamline" / "training.json").read_text())["steps"] for f in (alone, trained)]
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], abs=1e-4)
    results = place / "results.json"
    text = ("--perplexity", place / "text.jsonl", "--tokens", 1000, "--no-speed", "--no-generation", "--device", "cpu")
    words = ("evaluate", trained, "--against", place / "model", "-o", results, *text)
    process = launch(2, place, results, *words)
    assert process.returncode == 0, process.stderr
    assert len(Results.load(results).comparisons) == 1


@pytest.mark.slow
def test_what_was_stopped_on_two_ranks_goes_on_to_the_same_end(alone, place):
    out = place / "stopped"
    stopped_and_gone_on(place, out, None)
    check_same(alone, out)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_rank_that_is_told_to_stop_alone_stops_all(place, told):
    process = launch(2, place, place / f"stopped-{told}", STOP_RANK=str(told))
    assert process.returncode != 0
    assert process.stderr.count("stopped by SIGTERM; to go on:") == 1
    assert "Error:" not in process.stderr.replace("ChildFailedError:", "")


def stopped_and_gone_on(place, out, launcher):
    process = launch(2, place, out, launcher=launcher, STOP_AT="3")
    assert process.returncode != 0
    assert "stopped by SIGTERM; to go on:" in process.stderr
    assert list(out.glob("streamline/work/*/checkpoints/checkpoint-3/sealed.json"))
    process = launch(2, place, out, launcher=launcher)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("going on from the checkpoint at step 3 of 4") == 1


# --- DeepSpeed, where it is installed


def deepspeed_launcher(folder, **settings):
    """`accelerate launch` with our config of ZeRO, for two processes on the CPU."""
    pytest.importorskip("deepspeed")
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / "deepspeed_zero2.yaml").read_text())
    config |= {"num_processes": 2, "use_cpu": True}
    config["deepspeed_config"] |= settings
    path = folder / "deepspeed.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["accelerate.commands.launch", "--config_file", str(path), "--main_process_port", "0"]


@pytest.mark.slow
def test_deepspeed_trains_the_same_and_goes_on_where_it_was_stopped(alone, place, tmp_path):
    out = place / "deepspeed"
    stopped_and_gone_on(place, out, deepspeed_launcher(tmp_path))
    check_same(alone, out)
    assert list(out.glob("streamline/work/*/checkpoints/checkpoint-3/global_step3/zero_pp_rank_1_*"))  # it was ZeRO


@pytest.mark.slow
def test_weights_split_by_deepspeed_are_refused_before_the_work(place, tmp_path):
    out = place / "split-weights"
    process = launch(2, place, out, launcher=deepspeed_launcher(tmp_path, zero_stage=3))
    assert process.returncode != 0
    assert process.stderr.count("ConfigError: DeepSpeed's ZeRO 3") == 1
    assert not out.exists()


# --- the parts, without processes


def as_rank(monkeypatch, number, size):
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(size))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_item_belongs_to_one_rank_and_all_run_equally_many(monkeypatch, count, size):
    dealt = []
    for number in range(size):
        as_rank(monkeypatch, number, size)
        dealt.append(list(ranks.deal(range(count))))
    assert len({len(items) for items in dealt}) == 1
    own = [[item for item, mine in items if mine] for items in dealt]
    assert sorted(item for items in own for item in items) == list(range(count))
    monkeypatch.setattr(ranks, "gathered", lambda value: own)
    assert ranks.collected(own[0]) == list(range(count))


def test_what_one_rank_does_alone_waits_for_nobody(monkeypatch):
    as_rank(monkeypatch, 0, 2)
    with ranks._alone():
        assert ranks.from_main(lambda: ranks.from_main(lambda: 3)) == 3
        assert list(ranks.deal("ab")) == [("a", True), ("b", True)]
        assert ranks.gathered(5) == [5]
    as_rank(monkeypatch, 1, 2)
    with ranks._alone():
        assert list(ranks.deal("ab")) == [("a", True), ("b", True)]
    assert ranks.world_size() == 2


def test_alone_everything_is_as_it_was():
    assert ranks.rank() == 0
    assert ranks.world_size() == 1
    assert ranks.from_main(lambda: 3) == ranks.main_first(lambda: 3) == 3
    tensor = torch.ones(2)
    assert ranks.summed(tensor) is tensor
    assert ranks.gathered("x") == ["x"]
    assert ranks.first_to_fail()
    ranks.start("cpu")
    assert not torch.distributed.is_initialized()


def test_only_rank_0_writes(monkeypatch, tmp_path):
    as_rank(monkeypatch, 1, 2)
    write_text(tmp_path / "file", "of rank 1")
    assert not (tmp_path / "file").exists()
    as_rank(monkeypatch, 0, 2)
    write_text(tmp_path / "file", "of rank 0")
    assert (tmp_path / "file").read_text() == "of rank 0"


@pytest.mark.parametrize(
    ("at_once", "steps", "size", "expected"),
    [
        (4, 1, 1, (4, 1)),
        (4, 1, 2, (2, 1)),
        (4, 2, 2, (4, 1)),
        (4, 1, 4, (1, 1)),
        (4, 8, 8, (4, 1)),
        (4, 3, 2, (3, 2)),
        (4, 1, 8, (1, 1)),
        (3, 1, 2, (2, 1)),
    ],
)
def test_a_step_is_shared_and_stays_the_same(at_once, steps, size, expected):
    config = TrainingConfig(per_device_train_batch_size=at_once, gradient_accumulation_steps=steps)
    found = share_step(config, size)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == expected
    windows = expected[0] * expected[1] * size
    assert windows >= at_once * steps
    assert windows - at_once * steps < size  # grows only where it cannot be shared evenly


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "cpu_2"])
def test_the_configs_we_ship_are_accelerates(name):
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == (2 if name == "cpu_2" else 8)
    assert config.use_cpu == (name == "cpu_2")
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "cpu_2": "MULTI_GPU"}
    assert str(config.distributed_type).endswith(kinds[name])
