"""Prove a saved checkpoint: reload it in a fresh process and compare it with the model in memory.

Shapes: B sequences, T tokens, V vocabulary. The parent computes logits on a fixed probe and hands them over in a
temporary folder; `python -m llm_streamline.proof FOLDER` loads the checkpoint as any user would, makes its measurements
and writes them back; the parent judges. Nothing of the parent's state can leak into the reloaded model.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import ProofError
from llm_streamline.output import TOOL_FOLDER, write_json
from llm_streamline.schema import FrozenModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROOF_FILE = "proof.json"
# largest difference allowed, as a share of the largest logit; the same code on the same machine usually gives 0
LOGIT_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# cached and uncached forwards multiply matrices of other shapes, so their rounding differs
CACHE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
PROMPTS = (
    "The most important thing to know about the history of science is that",
    "She opened the old wooden box and found",
    "To make a good cup of tea, first",
)
_SAMPLE_TEXT = "A tokenizer's test: naïve café, 12  spaces, 3.14, tabs\tand\nlines, 漢字, 😀."
_NUM_NEW_TOKENS = 40
_DEGENERATE_SHARE = 0.7  # of the new tokens being one and the same
_DEGENERATE_REPETITION = 0.8  # of the 4-grams having occurred before


class Check(FrozenModel):
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    value: float | None = None
    tolerance: float | None = None


class Proof(FrozenModel):
    """Everything that was looked at, and whether the checkpoint may be handed over."""

    checks: tuple[Check, ...]
    seconds: float
    texts: tuple[str, ...] = ()  # what the reloaded model wrote after `PROMPTS`

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def raise_if_failed(self) -> None:
        """Do nothing when all is well.

        Raises:
            ProofError: a check failed; the message names it and what was found.
        """
        failed = [f"{check.name} ({check.detail})" for check in self.checks if not check.ok]
        if failed:
            raise ProofError(f"the saved checkpoint is not sound: {'; '.join(failed)}")


def prove_checkpoint(
    out: str | Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    against_text: Sequence[str] | None = None,
    own_code: bool = False,
) -> Proof:
    """Reload `out` in a fresh process and compare it with the model in memory; the result is kept in `proof.json`.

    The checks: `reload` no key missing, unexpected or of another shape, config free of quantisation and of the right
    dtype; `logits` equal on the same device in the same dtype; `cache` greedy generation with cache equals that
    without, in float32, three sequences padded on the left, past a sliding window of up to 512; `tokenizer` same ids
    and chat template; `text` what it writes is not degenerate where the original's text is not.

    Args:
        out: folder written by `save_checkpoint`.
        model: the model in memory; unchanged.
        tokenizer: the tokenizer in memory, None when none was saved.
        against_text: what the original model wrote, from `probe_texts`; without it the text check cannot fail.
        own_code: the folder ships modelling code that we wrote, to be run on loading.

    Returns:
        The checks. A process that dies gives a failed check, not an exception.
    """
    started = time.perf_counter()
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix="llm-streamline-proof-") as name:
        folder = Path(name)
        dtype = _write_request(folder, out, model, own_code)
        problem = _run_child(folder)
        reply = {} if problem else json.loads((folder / "reply.json").read_text(encoding="utf-8"))
    if problem:
        checks = [Check(name="reload", ok=False, detail=problem)]
    else:
        checks = [_judge_reload(reply, dtype), _judge_logits(reply, dtype), _judge_cache(reply)]
        checks += [_judge_tokenizer(reply, tokenizer), _judge_text(reply, tokenizer, against_text)]
    proof = Proof(
        checks=tuple(checks), seconds=round(time.perf_counter() - started, 1), texts=tuple(reply.get("texts", ()))
    )
    (out / TOOL_FOLDER).mkdir(exist_ok=True)
    write_json(out / TOOL_FOLDER / PROOF_FILE, {"ok": proof.ok, **proof.model_dump()})
    return proof


def probe_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str] = PROMPTS,
    num_new_tokens: int = _NUM_NEW_TOKENS,
) -> list[str]:
    """Return the greedy continuations of `prompts`, without the prompts: plain text, no chat template.

    Empty when the prompts do not fit into the model's positions.
    """
    import torch

    encoded = [list(tokenizer(prompt).input_ids) for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 10**9
    num_new_tokens = min(num_new_tokens, limit - longest)
    if num_new_tokens < 1 or not all(encoded):
        return []
    ids = torch.tensor([[_pad_id(model)] * (longest - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])
    new, _ = _greedy(model, ids.to(model.device), mask.to(model.device), num_new_tokens, use_cache=True, stop=True)
    return tokenizer.batch_decode(new, skip_special_tokens=True)


# --- parent: the question


def _write_request(folder: Path, out: Path, model: "PreTrainedModel", own_code: bool) -> str:
    import torch
    from safetensors.torch import save_file

    input_ids_BT = _probe_ids(model)
    logits_BTV = _logits(model, input_ids_BT)
    save_file({"input_ids": input_ids_BT, "logits": logits_BTV}, folder / "probe.safetensors")
    dtype = str(_main_dtype(model)).removeprefix("torch.")
    request = {
        "out": str(out.resolve()),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "own_code": own_code,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    return dtype


def _main_dtype(model: "PreTrainedModel") -> "torch.dtype":
    sizes: Counter = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _probe_ids(model: "PreTrainedModel", batch: int = 2, seq_len: int = 48) -> "torch.Tensor":
    """(B, T) int64 random token ids, the same every time, without ids that stand for an image or for padding."""
    import torch

    config = model.config.get_text_config(decoder=True)
    special = set()
    for part in (model.config, config):
        for key, value in part.to_dict().items():
            if "token" in key:
                special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    usable = torch.tensor([i for i in range(config.vocab_size) if i not in special] or [0])
    seq_len = min(seq_len, getattr(config, "max_position_embeddings", None) or seq_len)
    generator = torch.Generator().manual_seed(0)
    return usable[torch.randint(len(usable), (batch, seq_len), generator=generator)]


def _logits(model: "PreTrainedModel", input_ids_BT: "torch.Tensor") -> "torch.Tensor":
    """(B, T, V) float32 on the CPU, in eval mode, the model's mode restored."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=input_ids_BT.to(model.device), use_cache=False).logits.float().cpu().contiguous()
    finally:
        model.train(was_training)


def _run_child(folder: Path) -> str | None:
    """Run the fresh process; return what went wrong in it, or None."""
    package_home = str(Path(__file__).resolve().parents[1])
    paths = [package_home, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "llm_streamline.proof", str(folder)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0 and (folder / "reply.json").is_file():
        return None
    if done.returncode == -9:
        return "the fresh process was killed, most likely for lack of memory"
    lines = done.stderr.strip().splitlines()
    return (
        f"the fresh process could not load and run it: {lines[-1][:300] if lines else f'exit code {done.returncode}'}"
    )


# --- parent: the judgement


def _judge_reload(reply: dict[str, Any], dtype: str) -> Check:
    problems = [f"{len(reply[key])} {key} keys, e.g. {reply[key][0]}" for key in _KEY_KINDS if reply[key]]
    if reply["quantization_config"]:
        problems.append("config.json has a quantization_config")
    if reply["dtype"] != dtype:
        problems.append(f"loads as {reply['dtype']}, saved from {dtype}")
    return Check(name="reload", ok=not problems, detail="; ".join(problems) or "every key found, none left over")


def _judge_logits(reply: dict[str, Any], dtype: str) -> Check:
    difference, scale, tolerance = reply["logit_difference"], reply["logit_scale"], LOGIT_TOLERANCE.get(dtype, 1e-2)
    if difference is None:
        return Check(name="logits", ok=False, detail="the logits are not finite", tolerance=tolerance)
    share = difference / scale if scale else difference
    return Check(
        name="logits",
        ok=share <= tolerance,
        detail=f"{dtype}: largest difference {share:.1e} of the largest logit, {tolerance:.0e} allowed",
        value=share,
        tolerance=tolerance,
    )


def _judge_cache(reply: dict[str, Any]) -> Check:
    cache = reply["cache"]
    tolerance = CACHE_TOLERANCE.get(cache["dtype"], 5e-2)
    if cache["error"]:
        return Check(name="cache", ok=False, detail=cache["error"])
    share = cache["difference"]
    detail = f"{cache['steps']} steps of {cache['batch']} padded sequences, {cache['dtype']}"
    if cache["window_not_passed"]:
        detail += f", shorter than the window of {cache['window_not_passed']}"
    if share is None:
        return Check(name="cache", ok=False, detail=f"{detail}: the logits are not finite")
    detail += f": largest difference {share:.1e} of the largest logit, {tolerance:.0e} allowed"
    return Check(name="cache", ok=share <= tolerance, detail=detail, value=share, tolerance=tolerance)


def _judge_tokenizer(reply: dict[str, Any], tokenizer: "PreTrainedTokenizerBase | None") -> Check:
    if tokenizer is None:
        return Check(name="tokenizer", ok=True, detail="none was saved")
    problems = []
    if reply["sample_ids"] is None:
        problems.append("cannot be loaded")
    elif reply["sample_ids"] != tokenizer(_SAMPLE_TEXT).input_ids:
        problems.append("gives other ids for the same text")
    elif reply["chat_template"] != tokenizer.chat_template:
        problems.append("has another chat template")
    return Check(name="tokenizer", ok=not problems, detail=problems[0] if problems else "same ids, same chat template")


def _judge_text(
    reply: dict[str, Any], tokenizer: "PreTrainedTokenizerBase | None", against: Sequence[str] | None
) -> Check:
    if tokenizer is None or not reply["texts"]:
        return Check(name="text", ok=True, detail="no tokenizer, so no text")
    bad = sum(_is_degenerate(tokenizer, text) for text in reply["texts"])
    total = len(reply["texts"])
    detail = f"{bad} of {total} continuations are empty, one token repeated, or a loop"
    if not against:
        return Check(name="text", ok=True, detail=f"{detail}; nothing to compare with", value=bad / total)
    bad_before = sum(_is_degenerate(tokenizer, text) for text in against)
    # a model whose original already loops, or that loops once in three, is weak but not broken
    broken = bad == total and bad_before * 2 <= len(against)
    return Check(
        name="text", ok=not broken, detail=f"{detail}; original {bad_before} of {len(against)}", value=bad / total
    )


def _is_degenerate(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not text.strip():
        return True
    if len(ids) < 12:
        return False  # too short to tell a loop from an answer
    return repetition(ids) > _DEGENERATE_REPETITION or max(Counter(ids).values()) > _DEGENERATE_SHARE * len(ids)


def repetition(ids: Sequence[int], order: int = 4) -> float:
    """Share in [0, 1] of the n-grams of `ids` that occurred before; 0 when nothing repeats or there are none."""
    grams = [tuple(ids[i : i + order]) for i in range(len(ids) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- child: the fresh process

_KEY_KINDS = ("missing", "unexpected", "mismatched")


def _answer(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    options = {"attn_implementation": request["attention"]} if request["attention"] else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        request["out"],
        dtype="auto",
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=request["own_code"],
        **options,
    )
    info = info if isinstance(info, dict) else vars(info)
    reply: dict[str, Any] = {kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in _KEY_KINDS}
    reply["dtype"] = str(_main_dtype(model)).removeprefix("torch.")
    reply["quantization_config"] = bool(getattr(model.config, "quantization_config", None))
    model.eval().to(request["device"])
    probe = load_file(folder / "probe.safetensors")
    logits_BTV = _logits(model, probe["input_ids"])
    finite = bool(torch.isfinite(logits_BTV).all() and torch.isfinite(probe["logits"]).all())
    reply["logit_difference"] = (logits_BTV - probe["logits"]).abs().max().item() if finite else None
    reply["logit_scale"] = probe["logits"].abs().max().item() if finite else None
    reply |= _texts(Path(request["out"]), model, request["own_code"])
    reply["cache"] = _compare_cache(model, probe["input_ids"])
    (folder / "reply.json").write_text(json.dumps(reply), encoding="utf-8")


def _texts(out: Path, model: "PreTrainedModel", own_code: bool) -> dict[str, Any]:
    from transformers import AutoTokenizer

    if not (out / "tokenizer_config.json").is_file():
        return {"sample_ids": None, "chat_template": None, "texts": []}
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=own_code)
    return {
        "sample_ids": list(tokenizer(_SAMPLE_TEXT).input_ids),
        "chat_template": tokenizer.chat_template,
        "texts": probe_texts(model, tokenizer),
    }


def _compare_cache(model: "PreTrainedModel", input_ids_BT: "torch.Tensor") -> dict[str, Any]:
    """Generate greedily with and without cache, and compare the logits of every step until the tokens part."""
    import torch

    result: dict[str, Any] = {"error": None, "window_not_passed": None, "batch": 3}
    config = model.config.get_text_config(decoder=True)
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    window = max((w for w in windows if isinstance(w, int) and not isinstance(w, bool)), default=0)
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    num_new = max(1, min(10, limit // 2))
    longest = min(max(20, window + 4) if window <= 512 else 20, limit - num_new)
    if window >= longest + num_new:
        result["window_not_passed"] = window
    lengths = [longest, max(1, longest - 3), max(1, longest // 2)]
    if _float32_fits(model):
        model.float()
    result["dtype"] = str(_main_dtype(model)).removeprefix("torch.")
    ids, mask = _left_padded(input_ids_BT.flatten(), lengths, _pad_id(model))
    try:
        runs = [
            _greedy(model, ids.to(model.device), mask.to(model.device), num_new, use_cache=cached, stop=False)
            for cached in (True, False)
        ]
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:  # what broken surgery raises
        return {**result, "error": f"generation fails: {type(error).__name__}: {str(error)[:200]}"}
    (new_cached, logits_cached), (new_plain, logits_plain) = runs
    result["steps"] = len(logits_plain)
    together = torch.ones(len(lengths), dtype=torch.bool)
    difference = scale = 0.0
    for step, (left, right) in enumerate(zip(logits_cached, logits_plain, strict=True)):
        left, right = left.float().cpu()[together], right.float().cpu()[together]
        if len(left) and not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            return {**result, "difference": None}
        if len(left):
            difference = max(difference, (left - right).abs().max().item())
            scale = max(scale, right.abs().max().item())
        # tokens part at a tie within rounding; from there on the texts differ and cannot be compared
        together &= (new_cached[:, step] == new_plain[:, step]).cpu()
    return {**result, "difference": difference / scale if scale else difference}


def _float32_fits(model: "PreTrainedModel") -> bool:
    import psutil
    import torch

    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available
    return needed < 0.7 * free


def _pad_id(model: "PreTrainedModel") -> int:
    generation = model.generation_config
    for value in (generation.pad_token_id, generation.eos_token_id):
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def _left_padded(stream: "torch.Tensor", lengths: Sequence[int], pad: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(B, T) ids and mask: `lengths` tokens of the stream each, padded on the left to the longest."""
    import torch

    ids = torch.full((len(lengths), max(lengths)), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = stream.roll(-7 * row).repeat(length // len(stream) + 1)[:length]
        mask[row, -length:] = 1
    return ids, mask


def _greedy(
    model: "PreTrainedModel",
    ids_BT: "torch.Tensor",
    mask_BT: "torch.Tensor",
    num_new_tokens: int,
    *,
    use_cache: bool,
    stop: bool,
) -> tuple["torch.Tensor", tuple["torch.Tensor", ...]]:
    """Generate greedily whatever the model's own settings say; return (B, N) new ids and N times (B, V) logits."""
    import torch
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=num_new_tokens,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=_pad_id(model),
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id if stop else None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        with torch.no_grad():
            done = model.generate(ids_BT, attention_mask=mask_BT)
    finally:
        model.generation_config = own
    return done.sequences[:, ids_BT.shape[1] :], done.logits


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
