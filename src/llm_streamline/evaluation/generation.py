"""Let the models write, and tell whether the text is degenerate.

A pruned model may keep its multiple-choice scores and no longer write a sentence. Small models loop under greedy
decoding even when sound, so the verdict is relative: only what the original does not do counts against the model.
"""

import inspect
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import nn

from llm_streamline.errors import ConfigError, NumericsError
from llm_streamline.evaluation.result import Continuation, GenerationResult, Verdict
from llm_streamline.logs import progress_bar
from llm_streamline.memory_limits import BatchTooLarge, Portions, no_room_for
from llm_streamline.quiet import quiet_transformers

PROMPTS = (
    "The history of the city began when",
    "To make a simple vegetable soup, first",
    "She opened the letter, read the first line and",
    "The main difference between a virus and a bacterium is",
    "def average(numbers):\n    ",
    "Question: Why is the sky blue?\nAnswer:",
)
_NGRAM = 4
_LOOP_TURNS = 3  # a piece must occur so often in a row, at the end, to be a loop
_LOOP_SHARE = 0.25  # and take up so much of the text
_LOOP_TOKENS = 8  # and be so long: 'no, no, no' is a way to write
_PADDING_ERROR = 0.05  # relative; rounding in bfloat16 stays below, a misread padding does not

# The verdict: how much worse than the original a rate may be. Rates are means over the continuations.
_MORE_LOOPS = 0.34
_MORE_REPETITION = 0.3
_LESS_DISTINCT = 0.5
_MORE_EMPTY = 0.15
_SHORTER = 0.25
_OTHER_SCRIPT = 0.25


def repetition_rate(tokens: Sequence[int], n: int = _NGRAM) -> float:
    """Return the share of n-grams that occurred before in the same text; 0 when it is shorter than n."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Return different n-grams by all n-grams (Li et al. 2016, arXiv:1510.03055); 1 when there are none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the text ends in one piece said three times or more that fills a quarter of it or more."""
    tokens = list(tokens)
    for period in range(1, len(tokens) // _LOOP_TURNS + 1):
        same = 0  # trailing tokens that equal the one a period before
        while same < len(tokens) - period and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        covered = same + period
        if covered >= max(_LOOP_TURNS * period, _LOOP_TOKENS, _LOOP_SHARE * len(tokens)):
            return True
    return False


def main_script(text: str) -> str:
    """Return the script most letters are of, as Unicode names it ('LATIN', 'CYRILLIC', 'CJK'); '' without letters."""
    scripts = Counter(
        re.split(r"[ -]", unicodedata.name(letter, "UNKNOWN"), maxsplit=1)[0] for letter in text if letter.isalpha()
    )
    return scripts.most_common(1)[0][0] if scripts else ""


def generate_texts(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 64,
    max_positions: int | None = None,
    samples: int = 1,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> GenerationResult:
    """Continue every prompt once greedily and `samples` times sampled.

    Settings of the model's own generation config are not used: both models of a pair must write by the same rules.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: texts to continue, none empty.
        max_new_tokens: tokens written at most.
        max_positions: most tokens the model takes, prompt included; None: no limit.
        samples: sampled continuations of each prompt.
        temperature: of sampling.
        top_p: of sampling.
        seed: of sampling.

    Raises:
        ConfigError: a prompt is empty, or leaves no room to write.
        NumericsError: the model's probabilities are not finite.
        OutOfMemoryError: not even one prompt fits.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max((len(ids) for ids in encoded), default=0)
    if not encoded or not all(encoded) or (max_positions is not None and longest >= max_positions):
        raise ConfigError(f"prompts must have 1 to {(max_positions or 10**9) - 1} tokens, the longest has {longest}.")
    if max_positions is not None:
        max_new_tokens = min(max_new_tokens, max_positions - longest)
    batches = _batches(model, encoded)
    portions = Portions("generation", "lower evaluation.max_new_tokens", unit="prompts")
    texts: dict[tuple[int, int], Continuation] = {}
    ends = _end_tokens(model, tokenizer)
    own = [model.device] if model.device.type == "cuda" else []
    bar = progress_bar("generation", len(batches) * (samples + 1))
    with bar as bar, torch.random.fork_rng(own), quiet_transformers():
        torch.manual_seed(seed)
        for turn in range(samples + 1):
            write = partial(
                _generate,
                model,
                ends=ends,
                max_new_tokens=max_new_tokens,
                sampled=turn > 0,
                temperature=temperature,
                top_p=top_p,
            )
            for batch in batches:
                written = chain.from_iterable(portions.run([encoded[i] for i in batch], write))
                for i, row in zip(batch, written, strict=True):
                    texts[i, turn] = _continuation(prompts[i], "sampled" if turn else "greedy", row, ends, tokenizer)
                bar.advance()
    continuations = tuple(texts[i, turn] for i in range(len(prompts)) for turn in range(samples + 1))
    return _summary(continuations, max_new_tokens, temperature, top_p)


@torch.inference_mode()
def _batches(model: nn.Module, encoded: Sequence[list[int]]) -> list[list[int]]:
    """Return the prompts' numbers in batches: all in one if the model reads a padded prompt as the bare one.

    Tried out, because families differ in how they treat padding; where it matters, prompts of one length go together.
    """
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    short, long = encoded[by_length[0]], encoded[by_length[-1]]
    batches = [[i for i in by_length if len(encoded[i]) == n] for n in sorted({len(ids) for ids in encoded})]
    if len(batches) == 1:
        return batches
    try:
        with no_room_for(2, "prompts"):
            bare = model(**_padded(model, [short])).logits[0, -1].float()
            padded = model(**_padded(model, [short, long])).logits[0, -1].float()
    except BatchTooLarge:
        return batches
    return [by_length] if (padded - bare).norm() <= _PADDING_ERROR * bare.norm() else batches


def _padded(model: nn.Module, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Return rows padded on the left, with the mask, and positions where the model takes them."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    device = model.get_input_embeddings().weight.device
    return {name: value.to(device) for name, value in inputs.items()}


def _end_tokens(model: nn.Module, tokenizer) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


@contextmanager
def _same_draws() -> Iterator[None]:
    """Let what is tried again draw what the failed attempt drew."""
    on_gpu = torch.cuda.is_available()
    host, devices = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        yield
    except RuntimeError:
        torch.set_rng_state(host)
        if on_gpu:
            torch.cuda.set_rng_state_all(devices)
        raise


def _generate(model, prompts_ids, ends, max_new_tokens, sampled, temperature, top_p) -> list[list[int]]:
    """Continue prompts.

    Raises:
        NumericsError: the model's probabilities are not finite.
    """
    try:
        with _same_draws():
            return _continue(model, prompts_ids, ends, max_new_tokens, sampled, temperature, top_p)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericsError("generation: the model's probabilities are not finite.") from error


@torch.inference_mode()
def _continue(model, prompts_ids, ends, max_new_tokens, sampled, temperature, top_p) -> list[list[int]]:
    """Generate; everything that transformers would take from the model's own generation config is set."""
    inputs = _padded(model, prompts_ids)
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p} if sampled else {"do_sample": False}
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        min_length=0,
        max_length=None,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        top_k=0 if sampled else None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **({"temperature": None, "top_p": None} | options),
    )
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _continuation(prompt: str, mode: str, row: list[int], ends: list[int], tokenizer) -> Continuation:
    stop = next((i for i, token in enumerate(row) if token in ends), None)
    tokens = row if stop is None else row[:stop]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Continuation(
        prompt=prompt,
        mode=mode,
        text=text,
        num_tokens=len(tokens),
        ended=stop is not None,
        repetition_rate=repetition_rate(tokens),
        distinct_2=distinct(tokens),
        loop=ends_in_loop(tokens),
        empty=not text.strip(),
        script=main_script(text),
    )


def _summary(continuations, max_new_tokens, temperature, top_p) -> GenerationResult:
    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    return GenerationResult(
        continuations=continuations,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_rate=mean(one.repetition_rate for one in continuations),
        distinct_2=mean(one.distinct_2 for one in continuations),
        loop_rate=mean(one.loop for one in continuations),
        empty_rate=mean(one.empty for one in continuations),
        ended_rate=mean(one.ended for one in continuations),
        mean_tokens=mean(one.num_tokens for one in continuations),
    )


def judge_generation(original: GenerationResult, model: GenerationResult) -> Verdict:
    """Say in what way the model's text is degenerate where the original's, for the same prompts, is not.

    Bad is: a third more of the texts end in a loop; repeated 4-grams up by 0.3; distinct-2 below half; empty texts up
    by 0.15; texts a quarter as long; another script than the original's in a quarter of the texts.
    """
    reasons = []
    if model.loop_rate > original.loop_rate + _MORE_LOOPS:
        reasons.append(f"{model.loop_rate:.0%} of its texts end in a loop, of the original's {original.loop_rate:.0%}.")
    if model.repetition_rate > original.repetition_rate + _MORE_REPETITION:
        reasons.append(
            f"{model.repetition_rate:.0%} of its 4-grams are repeats, of the original's {original.repetition_rate:.0%}."
        )
    if model.distinct_2 < _LESS_DISTINCT * original.distinct_2:
        reasons.append(f"Its distinct-2 is {model.distinct_2:.2f}, the original's {original.distinct_2:.2f}.")
    if model.empty_rate > original.empty_rate + _MORE_EMPTY:
        reasons.append(f"{model.empty_rate:.0%} of its texts are empty, of the original's {original.empty_rate:.0%}.")
    if model.mean_tokens < _SHORTER * original.mean_tokens:
        reasons.append(
            f"Its texts are cut short: {model.mean_tokens:.0f} tokens, the original's {original.mean_tokens:.0f}."
        )
    pairs = list(zip(original.continuations, model.continuations, strict=True))
    switched = [after for before, after in pairs if before.script and after.script not in ("", before.script)]
    if len(switched) > _OTHER_SCRIPT * len(pairs):
        reasons.append(
            f"{len(switched)} of its {len(pairs)} texts are in another script than the original's "
            f"({', '.join(sorted({one.script.lower() for one in switched}))})."
        )
    return Verdict(ok=not reasons, reasons=tuple(reasons))
