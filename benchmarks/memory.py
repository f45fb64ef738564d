"""Peak memory and speed of runs within a limit, on a checkpoint of random weights that this script makes.

    python benchmarks/memory.py [--shape 7b] [--folder DIR] [--parts analyze,compress,save,pass,tokens] [--keep]

* analyze: 4k tokens within a limit of 3 GiB (7b): peak of anonymous memory, page cache excluded.
* compress: a quarter of the layers, 2k training tokens, MSE, within 6 GiB, evaluation and proof included.
* save: as many layers removed from the checkpoint and the rest saved, whole: what surgery and saving take.
* apply: the same as a user's command, within 6 GiB: with the text that the original writes, and the proof.
* pass: the time of a streamed pass, by the longer of reading the layers once for each batch and computing it with all
  layers in memory.
* tokens: the demo model with 50k and with 1M training tokens: the windows are made and mapped, then steps are taken on
  batches drawn evenly from all of them. Not the whole training: what could grow with the tokens is all there.

A part that misses its target is named under "missed" in the results file, and the exit code is 3; a part that fails
makes it 1. Peaks are sampled 50 times a second over all processes of a run. Results go to `memory.json`, of shapes
other than 7b to `memory-SHAPE.json`.
"""

import argparse
import json
import random
import shutil
import string
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from peak import watch
from regression import TARGET_MISSED
from shapes import SHAPES, make_checkpoint

GIB = 2**30
PARTS = ("analyze", "compress", "save", "apply", "pass", "tokens")
LIMITS = {"7b": ("3GiB", "6GiB"), "1.3b": ("1536MiB", "3GiB"), "0.3b": ("1GiB", "1536MiB"), "0.05b": ("1GiB", "1GiB")}
SEQ_LEN = 512
_SAVE_TARGET = 1 * GIB
_OVER_LIMIT = 1.1  # measured peak by limit
_PASS_TARGET = 1.3
_TOKENS_TARGET = 1.05
_STEPS = 8
_ROUNDS = 3
_MODES = ("streamed", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--folder", type=Path, help="where the checkpoint and the runs go; default: a temporary folder")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens of `analyze`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and the runs")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_CHILDREN[arguments.child[0]](*arguments.child[1:])))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="llm-streamline-memory-"))
    parts = arguments.parts.split(",")
    result = {"date": datetime.now(UTC).date().isoformat(), "shape": arguments.shape, "parts": {}}
    try:
        if set(parts) - {"tokens"} and not (folder / "model" / "config.json").is_file():
            started = time.perf_counter()
            result["checkpoint_bytes"] = make_checkpoint(folder / "model", arguments.shape)
            print(f"checkpoint: {result['checkpoint_bytes'] / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s")
        for part in parts:
            found = {"date": result["date"], **_RUNS[part](folder, arguments.shape, arguments.tokens)}
            result["parts"][part] = found
            print(part, json.dumps(found), flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    from llm_streamline.runtime import versions

    missed = _write({**result, "machine": versions()}, arguments.out)
    if any(found.get("returncode") for found in result["parts"].values()):
        sys.exit(1)  # what it reached before it failed is no peak of the whole
    if missed:
        sys.exit(TARGET_MISSED)


# --- parts


def analyze(folder: Path, shape: str, tokens: int) -> dict:
    limit = LIMITS[shape][0]
    run = _cli(folder, "analyze", "analyze", folder / "model", "--calibration-tokens", tokens, "--max-memory", limit)
    return _within(run, limit)


def compress(folder: Path, shape: str, _tokens: int) -> dict:
    limit, layers = LIMITS[shape][1], SHAPES[shape]["num_hidden_layers"]
    recipe = f"""
    text: {{seq_len: {SEQ_LEN}}}
    target: {{layers: {layers // 4}}}
    calibration: {{tokens: 1024}}
    selection: {{verify: 2, verify_tokens: 512}}
    replacement: {{fit_tokens: 1024}}
    training: {{tokens: 2048, objective: mse, num_evals: 1, validation_tokens: 512, per_device_train_batch_size: 2}}
    evaluation: {{tokens: 1024, limit: 8, max_new_tokens: 4, samples: 0, bootstrap: 0}}
    """
    (folder / "recipe.yaml").write_text("\n".join(line.strip() for line in recipe.splitlines()))
    options = ("--recipe", folder / "recipe.yaml", "--max-memory", limit)
    return _within(_cli(folder, "compress", "compress", folder / "model", *options), limit)


def save(folder: Path, shape: str, _tokens: int) -> dict:
    plan = _write_plan(folder, shape)
    command = [sys.executable, __file__, "--child", "save", str(folder / "model"), str(plan), str(folder / "out-save")]
    shutil.rmtree(folder / "out-save", ignore_errors=True)
    run = watch(command, folder / "save.log")
    found = {"returncode": run.returncode, "peak_bytes": run.peak_bytes, "seconds": round(run.seconds, 1)}
    return {**found, "target_bytes": _SAVE_TARGET, "ok": run.returncode == 0 and run.peak_bytes <= _SAVE_TARGET}


def apply(folder: Path, shape: str, _tokens: int) -> dict:
    limit, plan = LIMITS[shape][1], _write_plan(folder, shape)
    return _within(_cli(folder, "apply", "apply", plan, folder / "model", "--max-memory", limit), limit)


def _write_plan(folder: Path, shape: str) -> Path:
    """A plan that removes a quarter of the layers, from the middle on."""
    from llm_streamline.plan import Plan, Remove
    from llm_streamline.sources import load_skeleton, resolve_model
    from llm_streamline.stages.original import facts_of

    source, layers = resolve_model(folder / "model"), SHAPES[shape]["num_hidden_layers"]
    edit = Remove(start=layers // 2, stop=layers // 2 + layers // 4)
    plan = Plan(model=facts_of(source, load_skeleton(source)), edits=(edit,))
    (folder / "plan.json").write_text(plan.to_json())
    return folder / "plan.json"


def streamed_pass(folder: Path, shape: str, tokens: int) -> dict:
    found = _child(folder, "pass", "pass", folder / "model", tokens, LIMITS[shape][0])
    ratio = found["streamed_seconds"] / max(found["reading_seconds"], found["computing_seconds"])
    return {**found, "ratio": ratio, "target": _PASS_TARGET, "ok": ratio <= _PASS_TARGET}


def tokens_seen(folder: Path, _shape: str, _tokens: int) -> dict:
    peaks = {}
    folder.mkdir(parents=True, exist_ok=True)
    text = _write_text(
        folder / "text.jsonl", 1_300_000
    )  # the same file for both: `builtin` imports the more, the longer
    for count in (50_000, 1_000_000):
        windows = folder / f"windows-{count}"
        command = [sys.executable, __file__, "--child", "tokens", str(windows), str(count), str(text)]
        run = watch(command, folder / f"tokens-{count}.log")
        if run.returncode:
            raise SystemExit(run.output[-2000:])
        peaks[count] = run.peak_bytes
    ratio = peaks[1_000_000] / peaks[50_000]
    return {"peak_bytes": peaks, "ratio": ratio, "target": _TOKENS_TARGET, "ok": ratio <= _TOKENS_TARGET}


def _write_text(path: Path, num_words: int) -> Path:
    """Documents of 400 words drawn from a few hundred; a word is a token or more."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(500)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_words // 400):
            file.write(json.dumps({"text": " ".join(rng.choices(vocabulary, k=400))}) + "\n")
    return path


def _cli(folder: Path, name: str, command: str, *options: object) -> dict:
    out = folder / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    start = [sys.executable, "-m", "llm_streamline.cli", "-v", command]
    length = ("--seq-len", SEQ_LEN) if command == "analyze" else ()
    run = watch([*start, *map(str, (*options, *length, "-o", out))], folder / f"{name}.log")
    if run.returncode:
        print(run.output[-3000:], file=sys.stderr)
    said = " ".join(line.partition("INFO")[2].strip() or line.strip() for line in run.output.splitlines())
    forecast = said[said.find("within ") : said.find(")", said.find("within ")) + 1] if "within " in said else None
    return {
        "returncode": run.returncode,
        "peak_bytes": run.peak_bytes,
        "seconds": round(run.seconds, 1),
        "forecast": forecast,
    }


def _within(run: dict, limit: str) -> dict:
    from llm_streamline.sizes import parse_size

    target = round(_OVER_LIMIT * parse_size(limit))
    return {**run, "limit": limit, "target_bytes": target, "ok": run["returncode"] == 0 and run["peak_bytes"] <= target}


def _child(folder: Path, name: str, *arguments: object) -> dict:
    run = watch([sys.executable, __file__, "--child", *map(str, arguments)], folder / f"{name}.log")
    if run.returncode:
        raise SystemExit(run.output[-2000:])
    return json.loads(run.output.strip().splitlines()[-1])


# --- in processes of their own


def _pass_child(model: str, tokens: str, limit: str) -> dict:
    """Passes over random tokens with the layers on disk and in memory, in turns; the fastest of each counts."""
    import torch

    from llm_streamline.config import load_recipe
    from llm_streamline.data.windows import Windows
    from llm_streamline.estimates.budget import fit
    from llm_streamline.estimates.forecast import measure_rates
    from llm_streamline.measure.stats import CosineStats
    from llm_streamline.measure.stream import observe
    from llm_streamline.sources import load_model, resolve_model

    source = resolve_model(model)
    wish = {"max_memory": limit, "text.seq_len": SEQ_LEN, "calibration.tokens": tokens}
    fitted = fit(source, load_recipe(None, wish), ("measure",))
    batch, num_layers = fitted.recipe.calibration.batch_tokens, fitted.model.num_layers
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, int(tokens) // SEQ_LEN), SEQ_LEN)
    windows = Windows(input_ids=torch.randint(3, 4000, shape, generator=generator, dtype=torch.int32))
    models = {mode: load_model(source, with_tokenizer=False, layers_on_disk=mode == "streamed") for mode in _MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in _MODES}
    for _ in range(_ROUNDS):
        for mode, loaded in models.items():
            seconds[mode].append(observe(loaded.model, windows, CosineStats(num_layers), batch, mode))
    batches = -(-len(windows) // max(1, batch // SEQ_LEN))
    reading = batches * num_layers * fitted.model.layer / measure_rates(models["streamed"]).read_bytes_per_second
    return {
        "streamed_seconds": min(seconds["streamed"]),
        "computing_seconds": min(seconds["whole"]),
        "reading_seconds": reading,
        "batches": batches,
    }


def _save_child(model: str, plan: str, out: str) -> dict:
    """Surgery and saving alone, the layers on disk."""
    from llm_streamline.checkpoint import save_checkpoint
    from llm_streamline.plan import Plan
    from llm_streamline.replacements.build import install_plan
    from llm_streamline.sources import load_model, resolve_model

    loaded = load_model(resolve_model(model), layers_on_disk=True)
    install_plan(loaded.model, Plan.load(plan), [])
    save_checkpoint(loaded.model, loaded.tokenizer, out)
    return {}


def _tokens_child(folder: str, tokens: str, text: str) -> dict:
    """Windows for so many tokens, then a few steps on batches from all over them."""
    import torch

    from llm_streamline.config import load_recipe
    from llm_streamline.plan import Network, Plan, Replace
    from llm_streamline.replacements.build import build_replacements
    from llm_streamline.sources import resolve_model
    from llm_streamline.stages.original import load_original, model_facts
    from llm_streamline.stages.windows import make_windows
    from llm_streamline.training.student import Student

    recipe = load_recipe(None, {"training.tokens": tokens, "training.objective": "mse", "text.sources": [text]})
    loaded = load_original(resolve_model("demo"), recipe)
    windows = make_windows(loaded, recipe, ("train",), Path(folder))["train"]
    edit = Replace(start=12, stop=19, network=Network(kind="layer"), templates=(12,))
    plan = Plan(model=model_facts(loaded), edits=(edit,))
    student = Student(loaded.model, plan, build_replacements(loaded.model, plan), recipe.training)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-4)
    batch = recipe.training.per_device_train_batch_size
    for step in range(_STEPS):
        first = step * (len(windows) - batch) // (_STEPS - 1)
        student(torch.as_tensor(windows.input_ids[first : first + batch]))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    return {"windows": len(windows)}


_RUNS = {
    "analyze": analyze,
    "compress": compress,
    "save": save,
    "apply": apply,
    "pass": streamed_pass,
    "tokens": tokens_seen,
}
_CHILDREN = {"pass": _pass_child, "save": _save_child, "tokens": _tokens_child}


# --- results


def _write(result: dict, folder: Path) -> list[str]:
    """Write both files. Returns a line for each part that missed its target."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "memory" if result["shape"] == "7b" else f"memory-{result['shape']}"
    if (folder / f"{name}.json").is_file():  # parts may be measured one call at a time
        before = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["parts"]
        result = {**result, "parts": {**before, **result["parts"]}}
    result["missed"] = [
        f"{part} {' of '.join(_measured(found))}" for part, found in result["parts"].items() if not found["ok"]
    ]
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = [f"# Memory: a {result['shape']} checkpoint of random weights, {result['date']}", ""]
    rows += ["| part | measured | target | time | forecast |", "|---|---|---|---|---|"]
    for part, found in result["parts"].items():
        measured, target = _measured(found)
        verdict = "" if found["ok"] else " (missed)"
        forecast = found.get("forecast") or ""
        seconds = found.get("seconds", found.get("streamed_seconds"))
        took = "" if seconds is None else f"{seconds:.0f} s"
        rows.append(f"| {part} | {measured}{verdict} | {target} | {took} | {forecast} |")
    (folder / f"{name}.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return result["missed"]


def _measured(found: dict) -> tuple[str, str]:
    """What a part reached and what it may, in words."""
    if "target_bytes" in found:
        return f"{found['peak_bytes'] / GIB:.2f} GiB", f"{found['target_bytes'] / GIB:.2f} GiB"
    return f"ratio {found['ratio']:.3f}", f"{found['target']}"


if __name__ == "__main__":
    main()
