"""Perplexity with its whole protocol, and the divergence from an original on the same windows, in one pass.

Every window is scored on its own; which tokens count is part of the window, so that lengths, overlaps and special
tokens are decided where windows are made. Losses are float32, sums float64. Shapes: W windows, B windows in a batch,
T tokens of the longest, N scored tokens, V words.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llm_streamline import ranks
from llm_streamline.data.perplexity import perplexity_windows
from llm_streamline.data.windows import Windows
from llm_streamline.errors import TextError
from llm_streamline.evaluation.logits import LogitReader, check_finite
from llm_streamline.evaluation.result import DivergenceResult, PerplexityComparison, PerplexityResult
from llm_streamline.logs import progress_bar
from llm_streamline.memory_limits import Portions


@dataclass(frozen=True)
class ScoredWindow:
    """One window: token ids (T,) and which of them are scored (T,); the first never is, it has no context."""

    ids: Tensor
    scored: Tensor

    @property
    def num_scored(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())


@dataclass(frozen=True)
class ScoredText:
    """A text cut into windows, and how that was done."""

    name: str
    windows: tuple[ScoredWindow, ...]
    num_bytes: int  # UTF-8 bytes of the scored tokens
    context: int
    stride: int
    bos: str
    join: str

    @property
    def data_hash(self) -> str:
        """sha256 of the token ids and of which are scored."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(window.ids.to(torch.int32).numpy().tobytes())
            digest.update(window.scored.to(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass
class WindowLosses:
    """Summed negative log-likelihood (W,) float64, nats, and number of scored tokens (W,) of each window."""

    nll_W: np.ndarray
    tokens_W: np.ndarray


@dataclass
class Divergences:
    """KL(original || model) of every scored token, nats, by window; how many tokens have the same likeliest word."""

    kl: list[np.ndarray] = field(default_factory=list)
    same_top: list[int] = field(default_factory=list)


def scored_text(name: str, text: str, tokenizer, context: int, stride: int | None, tokens: int | None) -> ScoredText:
    """Cut one text into windows by the protocol of `data.perplexity_windows`.

    Raises:
        TextError: the text has not one token to score.
        ConfigError: context or stride is impossible.
    """
    try:
        found = perplexity_windows(text, tokenizer, context, stride=stride, max_tokens=tokens)
    except TextError as error:
        raise TextError(f"{name}: {error}") from None
    rows = zip(found.input_ids, found.scored, found.lengths.tolist(), strict=True)
    return ScoredText(
        name=name,
        windows=tuple(ScoredWindow(ids[:length].long(), scored[:length]) for ids, scored, length in rows),
        num_bytes=found.protocol["num_bytes"],
        context=found.protocol["context"],
        stride=found.protocol["stride"],
        bos=found.protocol["bos"],
        join="the text as it stands; documents of a data set joined by a blank line",
    )


def packed_text(name: str, packed: Windows, tokenizer) -> ScoredText:
    """Make a scored text of packed windows; special tokens (document boundaries) are context but not scored."""
    ids_WT = torch.as_tensor(packed.input_ids).long()
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    scored_WT = ~torch.isin(ids_WT, special)
    scored_WT[:, 0] = False
    pieces = tokenizer.batch_decode([ids[scored] for ids, scored in zip(ids_WT, scored_WT, strict=True)])
    rows = zip(ids_WT, scored_WT, strict=True)
    return ScoredText(
        name=name,
        windows=tuple(ScoredWindow(ids, scored) for ids, scored in rows if scored.any()),
        num_bytes=sum(len(piece.encode()) for piece in pieces),
        context=packed.seq_len,
        stride=packed.seq_len,
        bos=packed.provenance.get("bos", {}).get("placed", "as packed"),
        join="documents packed one after the other; tokens at their boundaries are not scored",
    )


def read_windows(
    text: ScoredText,
    model: LogitReader,
    original: LogitReader | None = None,
    *,
    batch_size: int | None = None,
    batch_tokens: int = 4096,
) -> tuple[WindowLosses, WindowLosses | None, Divergences | None]:
    """Run one or two models over a text. When memory ends, batches are halved; the results are the same.

    Args:
        text: windows of the tokenizer that the models share.
        model: the model to judge.
        original: the model to compare with; its vocabulary must have the same size.
        batch_size: windows in a forward pass; None: as many as `batch_tokens` allows.
        batch_tokens: tokens in a forward pass, when no size is given.

    Returns:
        The model's losses, and with an original its losses and the divergences.

    Raises:
        NumericsError: a log-likelihood is not finite; the message names text and window.
        OutOfMemoryError: not even one window fits.
    """
    count = len(text.windows)
    tokens_W = np.array([window.num_scored for window in text.windows])
    own = WindowLosses(np.zeros(count), tokens_W)
    other = WindowLosses(np.zeros(count), tokens_W) if original is not None else None
    divergences = Divergences([np.empty(0)] * count, [0] * count) if original is not None else None
    title = f"perplexity on {text.name}"
    portions = Portions(title, "shorten its windows (--context, or text.seq_len of a run)")

    def read(numbers: list[int], mine: bool) -> None:
        batch = [text.windows[number] for number in numbers]
        ids_BT = torch.nn.utils.rnn.pad_sequence([window.ids for window in batch], batch_first=True)
        states = model.states(ids_BT)
        reference = original.states(ids_BT) if original is not None else None
        if not mine:
            return
        for row, (number, window) in enumerate(zip(numbers, batch, strict=True)):
            places = window.scored.nonzero().squeeze(1) - 1  # the state before a token predicts it
            targets = window.ids[places + 1]
            where = f"text {text.name}, window {number}"
            if original is None:
                nll_N = -model.log_probs(states[row, places.to(states.device)], targets)
            else:
                nll_N, nll_reference_N, kl_N, same = _diverge(
                    model, states[row], original, reference[row], places, targets
                )
                check_finite(nll_reference_N, f"{where}, original")
                check_finite(kl_N, where)
                other.nll_W[number] = nll_reference_N.double().sum()
                divergences.kl[number], divergences.same_top[number] = kl_N.double().numpy(), same
            check_finite(nll_N, where)
            own.nll_W[number] = nll_N.double().sum()

    with progress_bar(title, count) as bar:
        for numbers, mine in ranks.deal(_batches(text.windows, batch_size, batch_tokens)):
            portions.run(numbers, partial(read, mine=mine))
            bar.advance(len(numbers) * ranks.world_size())
    _join_ranks(own, other, divergences)
    return own, other, divergences


def _join_ranks(own: WindowLosses, other: WindowLosses | None, divergences: Divergences | None) -> None:
    """Fill in the windows that other ranks have read; each window was read by one rank and is zero on the others."""
    if ranks.world_size() == 1:
        return
    parts = ranks.gathered((own.nll_W, None if other is None else other.nll_W, divergences))
    own.nll_W = sum(nll_W for nll_W, _, _ in parts)
    if other is not None and divergences is not None:
        other.nll_W = sum(nll_W for _, nll_W, _ in parts)
        found = [part for _, _, part in parts]
        divergences.kl = [max((one.kl[i] for one in found), key=len) for i in range(len(own.nll_W))]
        divergences.same_top = [sum(one.same_top[i] for one in found) for i in range(len(own.nll_W))]


def _batches(windows: Sequence[ScoredWindow], batch_size: int | None, batch_tokens: int) -> Iterator[list[int]]:
    """Yield window numbers, longest windows first."""
    order = sorted(range(len(windows)), key=lambda number: (-len(windows[number].ids), number))
    while order:
        size = batch_size or max(1, batch_tokens // len(windows[order[0]].ids))
        yield order[:size]
        order = order[size:]


@torch.inference_mode()
def _diverge(
    model: LogitReader, states_Td: Tensor, original: LogitReader, reference_Td: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Compare two models' distributions at some places of one window, in pieces that fit memory."""
    nll, nll_reference, kl, same = [], [], [], 0
    for piece in torch.arange(len(places)).split(min(model.chunk, original.chunk)):
        at, target = places[piece], targets[piece]
        log_q = model.logits(states_Td[at.to(states_Td.device)]).log_softmax(dim=-1)
        log_p = original.logits(reference_Td[at.to(reference_Td.device)]).log_softmax(dim=-1).to(log_q.device)
        target = target.to(log_q.device)[:, None]
        nll.append(-log_q.gather(1, target).squeeze(1).cpu())
        nll_reference.append(-log_p.gather(1, target).squeeze(1).cpu())
        same += int((log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).sum())
        kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0).cpu())  # rounding may dip below 0
    return torch.cat(nll), torch.cat(nll_reference), torch.cat(kl), same


def ratio_stderr(sums_W: np.ndarray, tokens_W: np.ndarray) -> float | None:
    """Return the standard error over windows of sum(sums) / sum(tokens); None with one window.

    Windows are the independent draws, tokens within one are not; they may differ in length.
    """
    count = len(sums_W)
    if count < 2:
        return None
    rest_W = sums_W - sums_W.sum() / tokens_W.sum() * tokens_W
    return float(math.sqrt(count / (count - 1) * (rest_W**2).sum()) / tokens_W.sum())


def perplexity_result(text: ScoredText, losses: WindowLosses, dtype: str) -> PerplexityResult:
    """Sum up one model's losses on a text.

    Raises:
        TextError: not one token was scored.
    """
    num_tokens = int(losses.tokens_W.sum())
    if num_tokens == 0:
        raise TextError(f"{text.name}: no token to score; a perplexity needs at least two tokens.")
    total = float(losses.nll_W.sum())
    nll = total / num_tokens
    return PerplexityResult(
        name=text.name,
        perplexity=math.exp(min(nll, 700.0)),  # e^700 is the last that a float holds
        nll=nll,
        nll_stderr=ratio_stderr(losses.nll_W, losses.tokens_W),
        bits_per_byte=total / math.log(2) / text.num_bytes if text.num_bytes else None,
        num_tokens=num_tokens,
        num_windows=len(text.windows),
        num_bytes=text.num_bytes,
        context=text.context,
        stride=text.stride,
        bos=text.bos,
        join=text.join,
        dtype=dtype,
        data_hash=text.data_hash,
    )


def compare_losses(name: str, original: WindowLosses, model: WindowLosses) -> PerplexityComparison:
    """Compare two models on the same windows; the standard error is of the paired differences."""
    differences_W = model.nll_W - original.nll_W
    difference = float(differences_W.sum() / model.tokens_W.sum())
    return PerplexityComparison(
        name=name,
        ratio=math.exp(min(difference, 700.0)),
        nll_difference=difference,
        nll_difference_stderr=ratio_stderr(differences_W, model.tokens_W),
    )


def divergence_result(name: str, divergences: Divergences) -> DivergenceResult:
    """Sum up the divergences on a text. Percentiles are over tokens."""
    kl_N = np.concatenate(divergences.kl)
    tokens_W = np.array([len(window) for window in divergences.kl])
    same_W = np.array(divergences.same_top, dtype=np.float64)
    return DivergenceResult(
        name=name,
        num_tokens=len(kl_N),
        kl_mean=float(kl_N.mean()),
        kl_stderr=ratio_stderr(np.array([window.sum() for window in divergences.kl]), tokens_W),
        kl_median=float(np.median(kl_N)),
        kl_p99=float(np.quantile(kl_N, 0.99)),
        kl_max=float(kl_N.max()),
        top1_agreement=float(same_W.sum() / len(kl_N)),
        top1_agreement_stderr=ratio_stderr(same_W, tokens_W),
    )
