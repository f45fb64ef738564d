"""Cost of an evaluation, as a ratio to the pure forward passes of the very same batches, taken in turns in one process.

    python benchmarks/evaluation.py --tasks arc_easy.jsonl piqa.jsonl blimp.jsonl.gz hellaswag.jsonl.gz --text TEXT.txt

`ours` is the whole of `evaluate` but loading the model: reading and tokenising the files, sorting, packing, forwards,
log-likelihoods, sums, result. `pure` hands the same padded batches to `model(...)`, logits and all, and looks at
nothing. With `--unshared` a third figure, `plain`: the same for batches in which every choice is a row of its own,
which is what a harness runs that does not share contexts. `--clock cpu` counts processor time instead of wall time, for
a machine that does other things meanwhile; it makes sense with one thread only (OMP_NUM_THREADS=1).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from llm_streamline.evaluation import choices
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.evaluate import evaluate
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.runtime import versions
from llm_streamline.sources import LoadedModel, load_model, resolve_model

RESULTS = Path(__file__).parent / "results"
Batches = list[dict[str, torch.Tensor]]


def main() -> None:
    arguments = _parse()
    loaded = load_model(resolve_model(arguments.model), arguments.dtype)
    config = EvaluationConfig(
        perplexity=(arguments.text,),
        tokens=arguments.tokens,
        tasks=tuple(arguments.tasks),
        limit=arguments.limit,
        generation=False,
        speed=False,
    )
    if arguments.clock == "cpu" and torch.get_num_threads() > 1:
        raise SystemExit("--clock cpu adds up the time of all threads; run with OMP_NUM_THREADS=1")
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    batches, unpacked = recorded(loaded, config), []
    if arguments.unshared:
        with packing(False):
            unpacked = recorded(loaded, config)
    ours, pure, plain = [], [], []
    for _ in range(arguments.rounds):
        pure.append(forwards(loaded.model, batches, clock))
        ours.append(timed_evaluation(loaded, config, clock))
        if unpacked:
            plain.append(forwards(loaded.model, unpacked, clock))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": versions(),
        "threads": torch.get_num_threads(),
        "model": arguments.model,
        "dtype": str(loaded.dtype),
        "tasks": [Path(task).name for task in arguments.tasks],
        "items_per_task": arguments.limit,
        "perplexity_tokens": arguments.tokens,
        "clock": arguments.clock,
        "padded_tokens": count(batches),
        "seconds": {"ours": ours, "pure": pure},
        "ratio_to_pure_forward": _ratio(ours, pure),
    }
    if unpacked:
        result["seconds"]["plain"] = plain
        result["padded_tokens_one_row_per_choice"] = count(unpacked)
        result["ratio_to_one_row_per_choice"] = _ratio(ours, plain)
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def recorded(loaded: LoadedModel, config: EvaluationConfig) -> Batches:
    """Evaluate once, and keep what every forward pass was given; it also warms everything up."""
    kept: Batches = []
    states = LogitReader.states

    def keep(reader: LogitReader, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        kept.append({"input_ids": input_ids.long(), **inputs})
        return states(reader, input_ids, **inputs)

    LogitReader.states = keep
    try:
        evaluate(loaded, config=config)
    finally:
        LogitReader.states = states
    return kept


@contextmanager
def packing(wanted: bool):
    """Let the scorer share contexts, or not."""
    can_pack = choices.can_pack
    if not wanted:
        choices.can_pack = lambda *_args, **_kwargs: False
    try:
        yield
    finally:
        choices.can_pack = can_pack


def timed_evaluation(loaded: LoadedModel, config: EvaluationConfig, clock: Callable[[], float]) -> float:
    started = clock()
    evaluate(loaded, config=config)
    return clock() - started


@torch.inference_mode()
def forwards(model: torch.nn.Module, batches: Batches, clock: Callable[[], float]) -> float:
    started = clock()
    for inputs in batches:
        model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)
    return clock() - started


def count(batches: Batches) -> int:
    return sum(inputs["input_ids"].numel() for inputs in batches)


def _ratio(ours: list[float], theirs: list[float]) -> dict:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tasks", nargs="+", required=True, help="multiple-choice files")
    parser.add_argument("--text", required=True)
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of perplexity")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--unshared", action="store_true", help="also time batches that share no context")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    main()
