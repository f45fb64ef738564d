"""Two processes against one on the same cores: the pass over all spans, and training steps.

    python benchmarks/scaling.py [--tokens 8192] [--train-tokens 4096] [--rounds 3]

One process has all cores as threads; two have half of them each and share the windows (torchrun, gloo). Loading is not
counted; both are started in turns, so that they meet the same machine. The ratio is two by one: at most 1 is the aim.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=8_192, help="of the pass")
    parser.add_argument("--train-tokens", type=int, default=4_096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    from llm_streamline.runtime import versions

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores < 2:
        raise SystemExit("two processes are compared with one on at least two cores; this process may use one only")
    found = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for processes in (1, 2):
            found[processes].append(start(arguments, processes, max(1, cores // processes)))
    ratios = {
        stage: [two[stage] / one[stage] for one, two in zip(found[1], found[2], strict=True)]
        for stage in ("analyze", "train")
    }
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": versions(),
        "cores": cores,
        "model": arguments.model,
        "tokens": arguments.tokens,
        "train_tokens": arguments.train_tokens,
        "seconds": {str(processes): rounds for processes, rounds in found.items()},
        "ratio_two_to_one": {
            stage: {"median": round(statistics.median(r), 3), "low": round(min(r), 3), "high": round(max(r), 3)}
            for stage, r in ratios.items()
        },
    }
    print(json.dumps(result, indent=2))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "scaling.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def start(arguments: argparse.Namespace, processes: int, threads: int) -> dict[str, float]:
    """Seconds of both stages in a fresh start with so many processes of so many threads."""
    script = [
        str(Path(__file__)), "--worker", "--model", arguments.model, "--tokens", str(arguments.tokens),
        "--train-tokens", str(arguments.train_tokens),
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{processes} processes failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def work(arguments: argparse.Namespace) -> None:
    """What each process does; rank 0 prints the seconds."""
    from simulator import recipe_of, run_pass, run_training

    from llm_streamline import ranks
    from llm_streamline.simulate.shape import shape_of
    from llm_streamline.simulate.task import Task
    from llm_streamline.sources import load_model, resolve_model

    ranks.start("cpu")
    model = load_model(ranks.main_first(lambda: resolve_model(arguments.model)), "auto", "cpu").model
    shape = shape_of(model.config, str(model.dtype).removeprefix("torch."))
    seconds = {}
    for stage, run, tokens in (
        ("analyze", run_pass, arguments.tokens),
        ("train", run_training, arguments.train_tokens),
    ):
        task = Task.of(shape, recipe_of("kl", tokens))
        once = run(model, task)  # builds; what is timed is the call below
        ranks.from_main(lambda: None)  # begin together
        started = time.perf_counter()
        once()
        seconds[stage] = time.perf_counter() - started
    if ranks.is_main():
        print(json.dumps(seconds))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
