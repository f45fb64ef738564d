"""Kill a small compress run at random moments and see whether the next start ends with the same bits.

    python benchmarks/kill.py [--kills 100] [--seed 0] [--chains 1] [--out benchmarks/results]

Each round starts a run in a fresh process image (a fork of this one, which has imported everything), sends it SIGKILL
after a random share of the time that an undisturbed run takes, and lets the next start finish. In one round of four the
second start is killed too. Then all that the run leaves, but for times, is compared bit for bit with an undisturbed
run: weights, tokenizer, statistics, plan, recipe, per-item logs, results, the training's log.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from small_run import bits, in_child, make_place, run, wait  # noqa: E402

from llm_streamline.runtime import versions  # noqa: E402

STAGES = ("text", "measure", "plan", "train", "save", "evaluate")


def killed_in(out: Path) -> str:
    """What the run was about to finish when it was killed."""
    tool = out / "streamline"
    if (tool / "manifest.json").exists():
        return "after the end"
    try:
        done = json.loads((tool / "stages.json").read_text())
    except (OSError, ValueError):
        done = {}
    return next((stage for stage in STAGES if stage not in done), "report")


def finish(place: Path, out: Path, log: Path) -> float:
    """Let a run end; the seconds it took."""
    started = time.monotonic()
    code = wait(in_child(lambda: run(place, out), log))
    if code:
        raise SystemExit(f"the start after a kill ended with {code}:\n{log.read_text()}")
    return time.monotonic() - started


def start_and_kill(place: Path, out: Path, log: Path, after: float) -> bool:
    """Start a run and kill it after some seconds; whether it was still at work."""
    pid = in_child(lambda: run(place, out), log)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def rounds(place: Path, folder: Path, seed: int, kills: int, truth: dict, undisturbed: float) -> dict:
    """Kill and compare until there were that many kills; raises SystemExit at the first difference."""
    os.setsid()  # where processor time is dealt out by session, chains do not share one portion
    draw, where, too_late, finished = random.Random(seed), Counter(), 0, 0
    out, log = folder / f"chain-{seed}" / "out", folder / f"log-{seed}"  # results name the folder
    out.parent.mkdir()
    while where.total() < kills:
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(2 if draw.random() < 0.25 else 1):
            if start_and_kill(place, out, log, draw.uniform(0, undisturbed)):
                where[killed_in(out)] += 1
            else:
                too_late += 1
        took = finish(place, out, log)
        undisturbed = 0.8 * undisturbed + 0.2 * max(took, 0.5 * undisturbed)  # the machine's load changes
        finished += 1
        found = bits(out)
        if found != truth:
            wrong = [name for name in truth if found.get(name) != truth[name]]
            raise SystemExit(f"killed in {dict(where)}: {wrong} differ from those of an undisturbed run")
        (folder / f"count-{seed}").write_text(json.dumps([where, too_late, finished]))
    return json.loads((folder / f"count-{seed}").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", type=int, default=1, help="rounds at the same time, each with a seed of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place, out, log = make_place(folder / "place"), folder / "out", folder / "log"
        undisturbed = finish(place, out, log)
        truth = bits(out)
        seeds = range(options.seed, options.seed + options.chains)
        each = -(-options.kills // options.chains)
        chains = {
            seed: in_child(
                lambda seed=seed: rounds(place, folder, seed, each, truth, undisturbed), folder / f"of-{seed}"
            )
            for seed in seeds
        }
        for seed, pid in chains.items():
            if wait(pid):
                raise SystemExit((folder / f"of-{seed}").read_text())
        counts = [json.loads((folder / f"count-{seed}").read_text()) for seed in seeds]
    where = sum((Counter(count[0]) for count in counts), Counter())
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "kills": where.total(),
        "killed_while_at_work_on": {stage: where[stage] for stage in (*STAGES, "report", "after the end")},
        "came_after_the_run_had_ended": sum(count[1] for count in counts),
        "next_starts_that_finished_with_the_same_bits": sum(count[2] for count in counts),
        "next_starts_that_did_not": 0,  # the first one ends the test
        "seeds": list(seeds),
        "versions": versions(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kill.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "kill.md").write_text(markdown(result))
    print(markdown(result))


def markdown(result: dict) -> str:
    rows = "".join(f"| {stage} | {count} |\n" for stage, count in result["killed_while_at_work_on"].items())
    return (
        f"# Kill test, {result['date']}\n\n"
        f"{result['kills']} SIGKILLs at random moments of a small `compress` run (`benchmarks/kill.py`, seeds "
        f"{result['seeds']}). {result['next_starts_that_finished_with_the_same_bits']} times the next start was left "
        "to finish; each time everything but times was bit for bit that of an undisturbed run.\n\n"
        f"| killed while at work on | times |\n| --- | --- |\n{rows}"
    )


if __name__ == "__main__":
    main()
