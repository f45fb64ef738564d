"""Documents -> tokens: fast in batches, and with the tokenizer's own manners at a document's start and end."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"


@dataclass(frozen=True)
class Boundaries:
    """The tokens put around each document.

    Where the tokenizer adds tokens before a text by itself (a BOS), each document begins with them. Where it does not,
    each document ends with the EOS, so that documents are still told apart. Tokens that the tokenizer puts after a text
    by itself stay in any case.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    tokenizer_adds_before: bool
    tokenizer_adds_after: bool

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Boundaries":
        """Find out what `tokenizer` does by asking it, not its settings: these are often not obeyed."""
        plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        full = tokenizer(_PROBE)["input_ids"]
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        start = starts[0] if starts else 0
        before, after = full[:start], full[start + len(plain) :] if starts else []
        adds_after = bool(after)
        if not before and not after and tokenizer.eos_token_id is not None:
            after = [tokenizer.eos_token_id]
        return cls(tuple(before), tuple(after), bool(before), adds_after)

    def record(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """The policy in words, for provenance: keys `bos` and `eos`."""

        def side(ids: tuple[int, ...], by_itself: bool, place: str) -> dict[str, Any]:
            return {
                "tokenizer_adds_it": by_itself,
                "placed": place if ids else "nowhere",
                "token_ids": list(ids),
                "tokens": tokenizer.convert_ids_to_tokens(list(ids)),
            }

        return {
            "bos": side(self.before, self.tokenizer_adds_before, "before every document"),
            "eos": side(self.after, self.tokenizer_adds_after, "after every document"),
        }


def encode_documents(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", boundaries: Boundaries
) -> list[np.ndarray]:
    """Tokenise many documents at once, boundary tokens included.

    A fast tokenizer spreads a batch over the cores by itself. TOKENIZERS_PARALLELISM is left as the user has it: unset,
    the library uses all cores here and turns itself off, safely, in processes forked later.

    Returns:
        One (number of tokens,) int32 array for each text.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,  # no warning about texts longer than the model's context: they are cut into windows later
    )["input_ids"]
    before, after = list(boundaries.before), list(boundaries.after)
    return [np.array(before + ids + after, dtype=np.int32) for ids in encoded]


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Sha256 in hex of what decides how text becomes tokens: vocabulary, merges, rules, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # state of the last call, not part of the tokenizer
        rules.pop("padding", None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    boundaries = Boundaries.of(tokenizer)
    facts = [rules, type(tokenizer).__name__, boundaries.before, boundaries.after, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
