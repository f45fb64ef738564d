"""One whole text -> windows for perplexity, with a protocol that says exactly what is scored.

Shapes: W windows, T tokens in a window (the context).
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llm_streamline.data.tokens import Boundaries
from llm_streamline.errors import ConfigError, TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 32  # more than any tokenizer averages over running text
_SPARE_CHARACTERS = 20_000


@dataclass(frozen=True, eq=False)
class PerplexityWindows:
    """Windows over one text, and which of their tokens count.

    Where `scored` is True the token counts: its negative log-likelihood given the tokens before it in its window. No
    token of the text is scored twice. Rows shorter than T are padded on the right; a causal model needs no mask there.
    """

    input_ids: torch.Tensor  # (W, T) int32
    scored: torch.Tensor  # (W, T) bool; never True at position 0
    lengths: torch.Tensor  # (W,) int64, tokens that are not padding
    protocol: dict[str, Any]

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def perplexity_windows(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    *,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> PerplexityWindows:
    """Cut one text, tokenised as a whole, into windows for perplexity.

    Where the tokenizer puts a BOS before a text by itself, every window begins with it and every token of the text is
    scored. Where it does not, nothing is put there, and the first token of a window is scored only if an earlier window
    scored it already: without a stride, the first token of each window is context only.

    Args:
        text: scored as it stands.
        tokenizer: of the model.
        context: tokens in a window, BOS included.
        stride: tokens of the text between the starts of windows; None: windows do not overlap. With a smaller stride,
            tokens that the window before has scored are context only.
        max_tokens: use only the first so many tokens of the text.

    Returns:
        Windows in the text's order. The last one is as long as what is left; it is left out when nothing in it would be
        scored. `protocol["num_bytes"]` counts the UTF-8 bytes of the scored tokens, so that bits per byte is
        nll_sum / ln 2 / num_bytes.

    Raises:
        TextError: if the text has not one token to score.
        ConfigError: if context or stride is too small, or the stride would skip tokens.
    """
    before = Boundaries.of(tokenizer).before
    room = context - len(before)  # tokens of the text in a window
    if room < 2:
        raise ConfigError(f"a context of {context} tokens is too short; it must hold at least {len(before) + 2}")
    step = room if stride is None else stride
    if not 1 <= step <= room:
        raise ConfigError(f"the stride must be from 1 to {room} tokens (context {context}), got {stride}")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be positive, got {max_tokens}")
    ids, starts = _tokenise(text, tokenizer, max_tokens)
    spans = _spans(len(ids), room, step, has_bos=bool(before))
    if not spans:
        raise TextError(f"the text gives {len(ids)} tokens, not one of them with a token before it; give more text")
    width = len(before) + max(stop - start for start, stop, _ in spans)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    input_ids = torch.full((len(spans), width), pad, dtype=torch.int32)
    scored = torch.zeros((len(spans), width), dtype=torch.bool)
    lengths = torch.empty(len(spans), dtype=torch.int64)
    for row, (start, stop, first_scored) in enumerate(spans):
        lengths[row] = len(before) + stop - start
        input_ids[row, : len(before)] = torch.tensor(before, dtype=torch.int32)
        input_ids[row, len(before) : lengths[row]] = torch.from_numpy(ids[start:stop])
        scored[row, len(before) + first_scored - start : lengths[row]] = True
    protocol = {
        "unit": "token",
        "context": context,
        "stride": step,
        "windows": len(spans),
        "overlap": "none" if step == room else f"{room - step} tokens, scored once",
        "bos": f"{tokenizer.convert_ids_to_tokens(list(before))} before every window" if before else "none",
        "first_token": "scored" if before else "context only, unless the window before scored it",
        "last_window": "kept, shorter",
        "tokens": len(ids),
        "tokens_limit": max_tokens,
        "num_tokens": int(scored.sum()),
        "num_bytes": sum(int(starts[stop] - starts[first]) for _, stop, first in spans),
        "text_bytes": int(starts[-1]),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return PerplexityWindows(input_ids, scored, lengths, protocol)


def _spans(num_tokens: int, room: int, step: int, has_bos: bool) -> list[tuple[int, int, int]]:
    """(start, stop, first scored) of each window, in tokens of the text; windows that score nothing are left out."""
    spans = []
    done = 0  # tokens up to here are scored, or never will be
    for start in range(0, num_tokens, step):
        stop = min(start + room, num_tokens)
        first = max(done, start if has_bos else start + 1)
        if first < stop:
            spans.append((start, stop, first))
        done = stop
        if stop == num_tokens:
            break
    return spans


def _tokenise(text: str, tokenizer: "PreTrainedTokenizerBase", limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the text and where they start.

    Returns:
        ids: (n,) int32.
        starts: (n + 1,) int64, bytes of UTF-8 before each token and, last, up to the end of the last token. A token
            reaches to the start of the next, so that white space a tokenizer swallows is counted.
    """
    head = text if limit is None else text[: limit * _CHARACTERS_PER_TOKEN + _SPARE_CHARACTERS]
    encoded = tokenizer(
        head,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        truncation=False,
        padding=False,
        verbose=False,
    )
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    if len(head) < len(text) and len(ids) <= limit:  # unusually long tokens: the head was too short
        ids, starts = _tokenise(text, tokenizer, None)
        return ids[:limit], starts[: limit + 1]
    if tokenizer.is_fast:
        characters = np.array([start for start, _ in encoded["offset_mapping"]] + [len(head)], dtype=np.int64)
        characters = np.maximum.accumulate(characters)
        characters[:1] = 0  # what the tokenizer strips at the text's start belongs to the first token
    else:
        pieces = (len(tokenizer.decode([i])) for i in ids.tolist())
        characters = np.minimum(np.cumsum([0, *pieces]), len(head))
        characters[-1] = len(head)
    starts = _bytes_before(head, characters)
    if limit is not None and len(ids) > limit:
        ids, starts = ids[:limit], starts[: limit + 1]
    return ids, starts


def _bytes_before(text: str, characters: np.ndarray) -> np.ndarray:
    """(n,) int64: UTF-8 bytes of the text before each of the ascending character positions."""
    if text.isascii():
        return characters
    widths = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (widths > 0x7F).astype(np.int8) + (widths > 0x7FF) + (widths > 0xFFFF)
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))[characters]
