"""The simulator against runs of this machine: time and peak memory, predicted from the config alone and then measured.

    python benchmarks/simulator.py [--quick]

Rates are measured on random layers of the same config (`simulate --rates here`; one thread is
timed by the processor's clock, so that a busy machine does not disturb it), then the pass over all spans, training
steps of each objective and a perplexity are predicted and run: the demo model at two budgets, and a tiny one.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from speed import random_windows
from transformers import LlamaConfig, LlamaForCausalLM

from llm_streamline import ranks
from llm_streamline.arch import get_layers
from llm_streamline.config import Recipe, load_recipe
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.evaluation.perplexity import ScoredText, ScoredWindow, read_windows
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe
from llm_streamline.plan import ModelFacts, Plan, Replace, templates_for
from llm_streamline.replacements.build import build_replacements
from llm_streamline.runtime import current_memory_bytes, peak_memory, reset_peak_memory, versions
from llm_streamline.simulate.devices import Device, measure_device
from llm_streamline.simulate.rates import cpu_clock
from llm_streamline.simulate.run import StageCost, simulate
from llm_streamline.simulate.shape import shape_of
from llm_streamline.simulate.task import Task
from llm_streamline.sources import load_model, resolve_model
from llm_streamline.training.heal import Healed
from llm_streamline.training.student import Student
from llm_streamline.training.trainer import train_student

TINY = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
STAGES = (  # with the objective, and what is trained
    ("analyze", "mse", "replacement"),
    ("train", "mse", "replacement"),
    ("train", "kl", "replacement"),
    ("train", "kl", "above"),
    ("evaluate: perplexity", "mse", "replacement"),
)
WARM_UP = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    cases = [("tiny", 16_384)] if arguments.quick else [("tiny", 16_384), ("demo", 4_096), ("demo", 8_192)]
    compare("warm-up", 1024)  # libraries are loaded as they are first used: not the run's own memory
    rows = [row for model, tokens in cases for row in compare(model, tokens)]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": versions(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "worst_error": {
            what: max((abs(row[f"{what}_error"]) for row in rows), default=None) for what in ("seconds", "memory")
        },
    }
    print(json.dumps(result, indent=2))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "simulator.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def recipe_of(objective: str, tokens: int, trainable: str = "replacement") -> Recipe:
    settings = {
        "text.seq_len": 512, "calibration.tokens": tokens, "training.tokens": tokens, "target.layers": 2,
        "training.objective": objective, "training.trainable": trainable, "training.num_evals": 0,
        "training.validation_tokens": 1024, "training.early_stopping_patience": 0, "evaluation.tokens": tokens,
        "evaluation.limit": 1,
    }  # fmt: skip
    return load_recipe(None, settings)


def compare(name: str, tokens: int) -> list[dict]:
    before = current_memory_bytes()
    if name == "demo":
        model = load_model(resolve_model("demo")).model
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = TINY if name == "tiny" else WARM_UP
            model = LlamaForCausalLM(LlamaConfig(**sizes, **HEADS)).eval().requires_grad_(False)
    dtype = str(model.dtype).removeprefix("torch.")
    shape = shape_of(model.config, dtype)
    device = measure_device(model.config, dtype, 2048, 512, "cpu")
    rows = []
    for stage, objective, trainable in STAGES:
        recipe = recipe_of(objective, tokens, trainable)
        task = Task.of(shape, recipe)
        said = {cost.stage: cost for cost in simulate(task, device).stages}
        run = {"analyze": run_pass, "train": run_training}.get(stage, run_perplexity)
        reset_peak_memory()
        clock, once = cpu_clock("cpu"), run(model, task)
        started = clock()
        once()
        seconds = clock() - started
        peak = peak_memory().host_bytes - before
        wished = {"objective": objective, "trainable": trainable} if stage == "train" else {}
        rows.append(row_of(name, stage, wished, tokens, expected(said, stage), seconds, peak, device))
    return rows


def expected(said: dict[str, StageCost], stage: str) -> tuple[float, float]:
    """Seconds and bytes; training is measured with its validations."""
    seconds = said[stage].seconds + (said["validate"].seconds * 2 if stage == "train" else 0.0)
    if stage == "evaluate: perplexity":
        return seconds / 2, said[stage].memory_bytes  # of the two models one is measured here
    return seconds, said[stage].memory_bytes


def row_of(name, stage, wished, tokens, said, seconds, peak, device: Device) -> dict:
    return {
        "model": name,
        "stage": stage,
        **wished,
        "tokens": tokens,
        "predicted_seconds": round(said[0], 3),
        "measured_seconds": round(seconds, 3),
        "seconds_error": round(said[0] / seconds - 1, 3),
        "predicted_memory": round(said[1]),
        "measured_memory": peak,
        "memory_error": round(said[1] / peak - 1, 3),
        "rates": device.source,
    }


def run_pass(model: torch.nn.Module, task: Task) -> Callable[[], object]:
    windows = random_windows(model, task.recipe.calibration.tokens)
    return lambda: observe(model, windows, CosineStats(len(get_layers(model))), 2048, "pass")


def run_training(model: torch.nn.Module, task: Task) -> Callable[[], object]:
    network, training = task.network, task.recipe.training
    facts = ModelFacts(
        spec="benchmark", fingerprint="", model_type=model.config.model_type, num_layers=task.shape.num_layers,
        hidden_size=task.shape.hidden_size, num_parameters=task.shape.parameters,
    )  # fmt: skip
    templates = templates_for(network, task.start, task.stop)
    edit = Replace(start=task.start, stop=task.stop, network=network, templates=templates)
    plan = Plan(model=facts, edits=(edit,))
    windows, held_out = random_windows(model, training.tokens), random_windows(model, training.validation_tokens)

    def run() -> None:
        with tempfile.TemporaryDirectory() as own:
            folder = ranks.from_main(lambda: own)  # several processes train into one folder
            networks = build_replacements(model, plan)
            healed = Healed(model, plan, networks, training, 0) if training.heals else None
            student = Student(model, plan, networks, training, healed)
            train_student(student, training, windows, held_out, Path(folder), 0)
            ranks.from_main(lambda: None)  # nobody writes there any more

    return run


def run_perplexity(model: torch.nn.Module, task: Task) -> Callable[[], None]:
    ids = random_windows(model, task.recipe.evaluation.tokens).input_ids.long()
    scored = torch.ones(ids.shape[1], dtype=torch.bool)
    scored[0] = False
    text = ScoredText("random", tuple(ScoredWindow(row, scored) for row in ids), 1, 512, 512, "none", "none")

    def run() -> None:
        read_windows(text, LogitReader(model))

    return run


if __name__ == "__main__":
    main()
