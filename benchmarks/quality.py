"""Quality at a fixed budget: the default recipe and the paper's, over several seeds, against the original.

    python benchmarks/quality.py --text TRAIN.jsonl.gz --evaluate HELDOUT.txt --seeds 0 1 2 --work DIR

Both recipes remove the same number of layers net, put one decoder layer back, and see the same text, training tokens
and window length. The figure is perplexity on the held-out text by the original's. A run that was killed goes on.
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
RECIPES = {"default": "default.yaml", "paper": "streamline-paper-small.yaml"}


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
    }
    recipe = load_recipe(HERE.parent / "recipes" / RECIPES[name], overrides)
    try:
        outcome = compress(arguments.model, Path(arguments.work) / f"{name}-{seed}", recipe)
    except ProofError as problem:  # a result, not an accident: the run's model does not hold what a checkpoint must
        return {"recipe": name, "seed": seed, "not_sound": str(problem)}
    pair = outcome.results.comparisons[0]
    measured = next(p for p in pair.perplexity if p.name == arguments.evaluate)
    divergence = next(d for d in pair.divergence if d.name == arguments.evaluate)
    result = outcome.results.models[-1]
    log = json.loads((outcome.out / "streamline" / "training.json").read_text(encoding="utf-8"))
    averages = [a for a in pair.stability_averages if a.name == "all"]
    return {
        "recipe": name,
        "seed": seed,
        "span": [outcome.plan.edits[0].start, outcome.plan.edits[0].stop],
        "layers": result.size.num_layers,
        "parameters": result.size.parameters,
        "perplexity": next(p.perplexity for p in result.perplexity if p.name == arguments.evaluate),
        "ratio": measured.ratio,
        "kl": divergence.kl_mean,
        "stability": {a.sigma: a.stability for a in averages},
        "accuracy": [averages[0].acc_original, averages[0].acc_model] if averages else None,
        "best_step": log["best_step"],
        "training_seconds": log["seconds"],
        "starts": log["starts"],
    }


def _write(arguments: argparse.Namespace, rows: list[dict]) -> None:
    found = {}
    for name in arguments.recipes:
        ratios = [row["ratio"] for row in rows if row["recipe"] == name and "ratio" in row]
        spread = statistics.stdev(ratios) if len(ratios) > 1 else None
        found[name] = {"mean_ratio": statistics.mean(ratios) if ratios else None, "stdev": spread, "ratios": ratios}
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": versions(),
        "protocol": {
            "model": arguments.model,
            "layers_fewer": arguments.layers,
            "train_tokens": arguments.train_tokens,
            "text": Path(arguments.text).name,
            "evaluated_on": Path(arguments.evaluate).name,
            "context": 1024,
            "evaluated_tokens": arguments.evaluate_tokens,
        },
        "recipes": found,
        "runs": rows,
    }
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Quality at a fixed budget",
        "",
        f"{record['date']}, `python benchmarks/quality.py`: {arguments.model}, {arguments.layers} layers fewer, one "
        f"decoder layer put back, {arguments.train_tokens:,} training tokens in windows of 512, perplexity on "
        f"the first {arguments.evaluate_tokens:,} tokens of `{Path(arguments.evaluate).name}` (context 1024).",
        "",
        "| recipe | seed | span | perplexity | x original | KL | training s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['recipe']} | {r['seed']} | {r['span']} | {r['perplexity']:.2f} | {r['ratio']:.3f} | {r['kl']:.3f} "
        f"| {r['training_seconds']:.0f} |"
        for r in rows
        if "ratio" in r
    ]
    lines.append("")
    lines += [f"* {r['recipe']}, seed {r['seed']}: no figure, {r['not_sound']}" for r in rows if "not_sound" in r]
    for name, entry in found.items():
        if not entry["ratios"]:
            continue
        spread = "one seed" if entry["stdev"] is None else f"standard deviation {entry['stdev']:.3f} over seeds"
        lines.append(f"* {name}: {entry['mean_ratio']:.3f} x the original's perplexity, {spread}")
    (folder / "quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
