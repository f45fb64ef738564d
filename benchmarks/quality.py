"""Quality at a fixed budget: the default recipe and the paper's, over several seeds, against the original.

    python benchmarks/quality.py --text TRAIN.jsonl.gz --evaluate HELDOUT.txt --seeds 0 1 2 --work DIR

All recipes remove the same number of layers net, put one decoder layer back, and see the same text, training tokens
and window length. The figure is perplexity on the held-out text by the original's. A run that was killed goes on, and
runs of other recipes, seeds or budgets of tokens that the results file holds for the same protocol stay in it.
"""

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

from llm_streamline.config import load_recipe
from llm_streamline.errors import ProofError
from llm_streamline.pipeline import compress
from llm_streamline.runtime import versions

HERE = Path(__file__).parent
RECIPES = {
    "default": "default.yaml",
    "replacement-only": "replacement-only.yaml",
    "paper": "streamline-paper-small.yaml",
}


def main() -> None:
    arguments = _parse()
    rows = []
    for seed in arguments.seeds:
        for name in arguments.recipes:
            rows.append(_one_run(arguments, name, seed))
            print(json.dumps(rows[-1]), flush=True)
    _write(arguments, rows)


def _one_run(arguments: argparse.Namespace, name: str, seed: int) -> dict:
    overrides = {
        "target.layers": arguments.layers,
        "text.sources": [arguments.text],
        "text.seq_len": 512,
        "training.tokens": arguments.train_tokens,
        "seed": seed,
        "evaluation.perplexity": [arguments.evaluate],
        "evaluation.context": 1024,
        "evaluation.tokens": arguments.evaluate_tokens,
        "evaluation.generation": False,
        "evaluation.tasks": arguments.tasks or None,
        "evaluation.limit": arguments.limit,
        "evaluation.speed": False,
        "accept_degenerate_text": True,  # a bad result is measured, not refused
    }
    recipe = load_recipe(HERE.parent / "recipes" / RECIPES[name], overrides)
    try:
        outcome = compress(arguments.model, Path(arguments.work) / _folder_name(name, seed, arguments), recipe)
    except ProofError as problem:  # a result, not an accident: the run's model does not hold what a checkpoint must
        return {"recipe": name, "seed": seed, "train_tokens": arguments.train_tokens, "not_sound": str(problem)}
    pair = outcome.results.comparisons[0]
    measured = next(p for p in pair.perplexity if p.name == arguments.evaluate)
    divergence = next(d for d in pair.divergence if d.name == arguments.evaluate)
    result = outcome.results.models[-1]
    log = json.loads((outcome.out / "streamline" / "training.json").read_text(encoding="utf-8"))
    averages = [a for a in pair.stability_averages if a.name == "all"]
    return {
        "recipe": name,
        "seed": seed,
        "train_tokens": arguments.train_tokens,
        "date": datetime.now(UTC).date().isoformat(),
        "span": [outcome.plan.edits[0].start, outcome.plan.edits[0].stop],
        "layers": result.size.num_layers,
        "parameters": result.size.parameters,
        "perplexity": next(p.perplexity for p in result.perplexity if p.name == arguments.evaluate),
        "ratio": measured.ratio,
        "kl": divergence.kl_mean,
        "stability": {a.sigma: a.stability for a in averages},
        "writes_loops": not _is_proven(outcome.out),
        "accuracy": [averages[0].acc_original, averages[0].acc_model] if averages else None,
        "best_step": log["best_step"],
        "training_seconds": log["seconds"],
        "starts": log["starts"],
    }


def _is_proven(out: Path) -> bool:
    """Whether every check of the proof passed; of an accepted checkpoint only that of the text may not have."""
    return json.loads((out / "streamline" / "proof.json").read_text(encoding="utf-8"))["ok"]


def _folder_name(name: str, seed: int, arguments: argparse.Namespace) -> str:
    return f"{name}-{arguments.train_tokens}-{seed}"


def _write(arguments: argparse.Namespace, rows: list[dict]) -> None:
    protocol = {
        "model": arguments.model,
        "layers_fewer": arguments.layers,
        "text": Path(arguments.text).name,
        "evaluated_on": Path(arguments.evaluate).name,
        "context": 1024,
        "evaluated_tokens": arguments.evaluate_tokens,
    }
    rows = _with_earlier(arguments.out / "quality.json", protocol, rows)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": versions(),
        "protocol": protocol,
        "recipes": _summaries(rows),
        "runs": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "quality.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "quality.md").write_text(_page(record), encoding="utf-8")


def _with_earlier(path: Path, protocol: dict, rows: list[dict]) -> list[dict]:
    """These runs, and those of an earlier call that were measured in the same way, in the order of the recipes."""
    if not path.is_file():
        return rows
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["protocol"] != protocol:
        return rows
    runs = {_name(row): row for row in [*earlier["runs"], *rows]}
    return sorted(runs.values(), key=lambda row: (list(RECIPES).index(row["recipe"]), row["train_tokens"], row["seed"]))


def _name(row: dict) -> tuple:
    return row["recipe"], row["train_tokens"], row["seed"]


def _summaries(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Recipe -> training tokens -> mean and spread of the ratios."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        entry = found.setdefault(row["recipe"], {}).setdefault(str(row["train_tokens"]), {"ratios": []})
        entry["ratios"] += [row["ratio"]] if "ratio" in row else []
    for entry in (entry for budgets in found.values() for entry in budgets.values()):
        entry["mean_ratio"] = statistics.mean(entry["ratios"]) if entry["ratios"] else None
        entry["stdev"] = statistics.stdev(entry["ratios"]) if len(entry["ratios"]) > 1 else None
    return found


def _page(record: dict) -> str:
    protocol = record["protocol"]
    lines = [
        "# Quality at a fixed budget",
        "",
        f"{record['date']}, `python benchmarks/quality.py`: {protocol['model']}, {protocol['layers_fewer']} layers "
        "fewer, one decoder layer put back, trained on windows of 512 tokens, perplexity on the first "
        f"{protocol['evaluated_tokens']:,} tokens of `{protocol['evaluated_on']}` (context {protocol['context']}).",
        "",
        "| recipe | training tokens | seed | span | perplexity | x original | KL | training s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['recipe']} | {r['train_tokens']:,} | {r['seed']} | {r['span']} | {r['perplexity']:.2f} "
        f"| {r['ratio']:.3f} | {r['kl']:.3f} | {r['training_seconds']:.0f} |"
        for r in record["runs"]
        if "ratio" in r
    ]
    lines.append("")
    lines += [
        f"* {r['recipe']}, seed {r['seed']}: no figure, {r['not_sound']}" for r in record["runs"] if "not_sound" in r
    ]
    lines += [
        f"* {r['recipe']}, seed {r['seed']}: sound, but all that it writes is loops"
        for r in record["runs"]
        if r.get("writes_loops")
    ]
    for name, budgets in record["recipes"].items():
        for tokens, entry in budgets.items():
            if entry["ratios"]:
                spread = "one seed" if entry["stdev"] is None else f"standard deviation {entry['stdev']:.3f} over seeds"
                label = f"{name}, {int(tokens):,} tokens"
                lines.append(f"* {label}: {entry['mean_ratio']:.3f} x the original's perplexity, {spread}")
    return "\n".join(lines) + "\n"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--train-tokens", type=int, default=262_144)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--evaluate-tokens", type=int, default=32_768, help="of the held-out text, from its start")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--work", default="runs/quality")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
