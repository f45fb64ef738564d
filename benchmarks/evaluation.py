"""Cost of an evaluation, as a ratio to the pure forward passes of the very same batches, taken in turns batch by batch.

    python benchmarks/evaluation.py --tasks arc_easy.jsonl piqa.jsonl blimp.jsonl.gz hellaswag.jsonl.gz --text TEXT.txt

`ours` is the whole of `evaluate` but loading the model: reading and tokenising the files, sorting, packing, forwards,
log-likelihoods, sums, result. `pure` hands each padded batch to `model(...)` right after ours has run it, logits and
all, and looks at nothing; its time is taken out of ours. So what else the machine does falls on both alike.
`--clock cpu` counts processor time instead of wall time, for a busy machine (with one thread only: OMP_NUM_THREADS=1).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.evaluate import evaluate
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.runtime import versions
from llm_streamline.sources import LoadedModel, load_model, resolve_model

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = _parse()
    if arguments.clock == "cpu" and torch.get_num_threads() > 1:
        raise SystemExit("--clock cpu adds up the time of all threads; run with OMP_NUM_THREADS=1")
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    loaded = load_model(resolve_model(arguments.model), arguments.dtype)
    wanted = {"perplexity": (arguments.text,), "tasks": tuple(arguments.tasks), "generation": False, "speed": False}
    evaluate(loaded, config=EvaluationConfig(**wanted, tokens=1024, limit=2))  # warms everything up
    config = EvaluationConfig(**wanted, tokens=arguments.tokens, limit=arguments.limit)
    rounds = [one_round(loaded, config, clock) for _ in range(arguments.rounds)]
    ratios = [found["ours"] / found["pure"] for found in rounds]
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
        "rounds": rounds,
        "ratio_to_pure_forward": {
            "median": round(statistics.median(ratios), 3),
            "low": round(min(ratios), 3),
            "high": round(max(ratios), 3),
        },
    }
    print(json.dumps(result, indent=2))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def one_round(loaded: LoadedModel, config: EvaluationConfig, clock: Callable[[], float]) -> dict[str, float]:
    """Evaluate once, with a pure forward of the same batch after each of ours.

    Returns:
        Seconds of the evaluation without the pure forwards, seconds of these, and padded tokens.
    """
    seconds, tokens = 0.0, 0
    states = LogitReader.states

    @torch.inference_mode()
    def and_purely(reader: LogitReader, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        nonlocal seconds, tokens
        found = states(reader, input_ids, **inputs)
        batch = {"input_ids": input_ids.long(), **inputs}
        batch = {name: value.to(reader.device) for name, value in batch.items()}
        started = clock()
        reader.model(**batch, use_cache=False)
        seconds += clock() - started
        tokens += input_ids.numel()
        return found

    LogitReader.states = and_purely
    try:
        started = clock()
        evaluate(loaded, config=config)
        whole = clock() - started
    finally:
        LogitReader.states = states
    return {"ours": whole - seconds, "pure": seconds, "padded_tokens": tokens}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tasks", nargs="+", required=True, help="multiple-choice files")
    parser.add_argument("--text", required=True)
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of perplexity")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    main()
