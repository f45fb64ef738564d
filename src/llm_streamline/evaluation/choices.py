"""Our light scorer: log-likelihoods of multiple-choice answers, one forward for what the choices of a question share.

Tokens are taken as lm-evaluation-harness does, so that the numbers agree: context + continuation is encoded as one
string, the continuation's tokens are those after as many as the context alone has; trailing spaces of the context go to
the continuation; an empty context becomes the beginning-of-text token (end-of-text where there is none).

The inputs of one question's choices share a prefix. Where the model allows it (`can_pack`) the prefix is run once and
the choices' rests follow it in one row, each seeing the prefix and itself:

    row   p p p p | a a a | b b        rests a and b both sit at position 4 onward; b does not see a

Otherwise every choice is a row of its own. Rows are sorted by length and padded on the right, which a causal model
never sees. Shapes: B rows, T tokens of the longest row, C choices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_streamline import ranks
from llm_streamline.errors import TaskError
from llm_streamline.evaluation.items import ChoiceTask, Item
from llm_streamline.evaluation.logits import LogitReader, check_finite
from llm_streamline.logs import get_logger, progress_bar
from llm_streamline.memory_limits import Portions

_FAR_FROM_WRONG = 0.1  # packed states must be so much nearer to the plain ones than states with a wrong mask


@dataclass(frozen=True)
class Choice:
    """The tokens of one choice: what the model reads, and how many at the end are scored."""

    tokens: tuple[int, ...]  # context and continuation
    num_scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """All but the last token, which only is a target."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class ScoredItem:
    """One question with the log-likelihood of each choice, nats."""

    item: Item
    loglikelihoods: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_chars: tuple[int, ...]  # of each choice without its leading space
    num_bytes: tuple[int, ...]

    @property
    def prediction(self) -> int:
        """The choice of highest log-likelihood, the first of equals."""
        return max(range(len(self.loglikelihoods)), key=self.loglikelihoods.__getitem__)

    @property
    def prediction_norm(self) -> int | None:
        """The choice of highest log-likelihood per character; None when the choices differ in context."""
        if not self.item.shared_context:
            return None
        scores = [ll / chars for ll, chars in zip(self.loglikelihoods, self.num_chars, strict=True)]
        return max(range(len(scores)), key=scores.__getitem__)


def encode_items(items: Sequence[Item], tokenizer, max_length: int | None) -> list[list[Choice]]:
    """Tokenise every choice of every item; too long ones lose tokens on the left, as in lm-evaluation-harness.

    Args:
        items: questions.
        tokenizer: the model's.
        max_length: most tokens the model reads at once; None: no limit.

    Raises:
        TaskError: the tokenizer has neither a beginning- nor an end-of-text token but a context is empty, or a
            continuation alone is longer than `max_length`.
    """
    pairs = [_split(c, t) for item in items for c, t in zip(item.contexts, item.continuations, strict=True)]
    contexts = sorted({context for context, _ in pairs if context})
    context_ids = dict(zip(contexts, _encode(tokenizer, contexts), strict=True))
    whole_ids = iter(_encode(tokenizer, [context + text for context, text in pairs if context]))
    alone_ids = iter(_encode(tokenizer, [text for context, text in pairs if not context], add_special_tokens=False))
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded: list[list[Choice]] = []
    at = iter(pairs)
    for item in items:
        choices = []
        for _ in item.contexts:
            context, _text = next(at)
            if context:
                tokens = next(whole_ids)
                num_scored = len(tokens) - len(context_ids[context])
            else:
                if prefix is None:
                    raise TaskError(
                        f"question '{item.id}' has no context and the tokenizer no BOS or EOS to begin with."
                    )
                tokens = next(alone_ids)
                tokens = tokens if tokens[:1] == [prefix] else [prefix, *tokens]
                num_scored = len(tokens) - 1
            if num_scored < 1 or (max_length is not None and num_scored > max_length):
                raise TaskError(
                    f"question '{item.id}': a choice has {num_scored} tokens after its context; "
                    f"possible are 1 to {max_length or 'any number'}."
                )
            kept = tokens if max_length is None else tokens[-(max_length + 1) :]
            choices.append(Choice(tuple(kept), num_scored))
        encoded.append(choices)
    return encoded


def _split(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _encode(tokenizer, texts: list[str], **options) -> list[list[int]]:
    return tokenizer(texts, **options)["input_ids"] if texts else []


@dataclass(frozen=True)
class _Row:
    """One row of a batch: tokens, their positions, which branch each is of (0: seen by all), what is scored.

    `scored` holds (place in the row, target token, choice number) of every scored token.
    """

    item: int
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    scored: tuple[tuple[int, int, int], ...]


def _plain_row(item: int, number: int, choice: Choice) -> _Row:
    length = len(choice.inputs)
    places = range(length - choice.num_scored, length)
    scored = tuple((place, choice.tokens[place + 1], number) for place in places)
    return _Row(item, choice.inputs, tuple(range(length)), (0,) * length, scored)


def _packed_row(item: int, choices: Sequence[Choice]) -> _Row:
    """Put what all choices begin with once, then the rest of each choice."""
    shared = _common_prefix([choice.inputs for choice in choices])
    tokens, positions, branches = list(choices[0].inputs[:shared]), list(range(shared)), [0] * shared
    scored = []
    for number, choice in enumerate(choices):
        length, offset = len(choice.inputs), len(tokens) - shared
        for place in range(length - choice.num_scored, length):
            scored.append((place if place < shared else place + offset, choice.tokens[place + 1], number))
        tokens += choice.inputs[shared:]
        positions += range(shared, length)
        branches += [number + 1] * (length - shared)
    return _Row(item, tuple(tokens), tuple(positions), tuple(branches), tuple(scored))


def _common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    first, last = min(rows), max(rows)  # in lexical order the extremes share what all share
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return length


def _pad(rows: Sequence[_Row], field: str) -> Tensor:
    longest = max(len(row.tokens) for row in rows)
    return torch.tensor([[*getattr(row, field), *[0] * (longest - len(row.tokens))] for row in rows])


def _branch_mask(rows: Sequence[_Row], dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, 1, T, T): causal, and no branch sees another."""
    branches_BT = _pad(rows, "branches")
    query, key = branches_BT[:, :, None], branches_BT[:, None, :]
    length = branches_BT.shape[1]
    sees = ((key == 0) | (key == query)) & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def can_pack(reader: LogitReader, longest: int) -> bool:
    """Whether this model gives the same states for packed rows as for plain ones.

    Tried on a small row of its own tokens, because it depends on how the family treats masks and positions: recurrent
    layers and ALiBi, for example, cannot. Layers that see only a window can as long as nothing is longer than it.

    Args:
        reader: of the model.
        longest: tokens in the longest plain row.
    """
    config = reader.model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    if any(isinstance(window, int) and window < longest for window in windows):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    if reader.takes_packed is None:
        reader.takes_packed = _packs_exactly(reader)
    return reader.takes_packed


def _packs_exactly(reader: LogitReader) -> bool:
    ids = [7 * i % reader.vocab_size for i in range(3, 41)]
    # the first rest is long: what the second would wrongly see of it must outweigh the rounding of half precision
    choices = [Choice((*ids[:6], *rest, 0), 1) for rest in (ids[6:30], ids[30:])]
    packed = _packed_row(0, choices)
    try:
        found = reader.states(**_packed_inputs([packed], reader))[0].float()
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        get_logger().debug("this model takes no packed choices (%s); each choice gets a row", error)
        return False
    unmasked = reader.states(torch.tensor([packed.tokens]))[0].float()
    second = slice(len(choices[0].inputs), None)  # the rest of choice 1, which a wrong mask or position would change
    truth = reader.states(torch.tensor([choices[1].inputs]))[0].float()[6:]
    error = (found[second] - truth).norm()
    return bool(error <= _FAR_FROM_WRONG * (unmasked[second] - truth).norm())


def _packed_inputs(rows: Sequence[_Row], reader: LogitReader) -> dict[str, Tensor]:
    dtype = reader.model.get_input_embeddings().weight.dtype
    return {
        "input_ids": _pad(rows, "tokens"),
        "position_ids": _pad(rows, "positions"),
        "attention_mask": _branch_mask(rows, dtype),
    }


def _batches(rows: Sequence[_Row], batch_size: int | None, batch_tokens: int) -> Iterator[list[_Row]]:
    """Yield rows from long to short, as many as fit the size or, without one, the token budget (at least one)."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: (-len(row.tokens), row.tokens)):
        longest = len(batch[0].tokens) if batch else len(row.tokens)
        full = len(batch) == batch_size if batch_size else (len(batch) + 1) * longest > batch_tokens
        if batch and full:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_task(
    task: ChoiceTask,
    reader: LogitReader,
    tokenizer,
    *,
    max_length: int | None = None,
    batch_size: int | None = None,
    batch_tokens: int = 4096,
    pack: bool | None = None,
) -> list[ScoredItem]:
    """Score every choice of every question. When memory ends, batches are halved; the results are the same.

    Args:
        task: the questions, worked examples included in their contexts.
        reader: of the model.
        tokenizer: the model's.
        max_length: most tokens the model reads at once.
        batch_size: rows in a forward pass; None: as many as `batch_tokens` allows.
        batch_tokens: padded tokens in a forward pass, when no size is given.
        pack: run what choices share once; None: when the model can.

    Returns:
        The questions in the task's order with their log-likelihoods.

    Raises:
        TaskError: a choice cannot be tokenised or is too long.
        NumericsError: a log-likelihood is not finite; the message names task and question.
        OutOfMemoryError: not even one row fits.
    """
    encoded = encode_items(task.items, tokenizer, max_length)
    if pack is None:
        pack = can_pack(reader, max(len(choice.inputs) for choices in encoded for choice in choices))
    if pack:
        rows = [_packed_row(i, choices) for i, choices in enumerate(encoded)]
    else:
        rows = [_plain_row(i, c, choice) for i, choices in enumerate(encoded) for c, choice in enumerate(choices)]
    sums = [[0.0] * len(choices) for choices in encoded]
    title = f"task {task.name}"
    portions = Portions(title, "use fewer worked examples (--num-fewshot)")

    def score(batch: Sequence[_Row], mine: bool) -> None:
        inputs = _packed_inputs(batch, reader) if pack else {"input_ids": _pad(batch, "tokens")}
        states_BTd = reader.states(**inputs)
        if not mine:
            return
        # choices that begin alike share scored tokens: each is looked up once
        wanted = {(b, place, target): 0 for b, row in enumerate(batch) for place, target, _ in row.scored}
        index = torch.tensor(list(wanted), device=states_BTd.device)
        found_N = reader.log_probs(states_BTd[index[:, 0], index[:, 1]], index[:, 2])
        _add_up(batch, dict(zip(wanted, found_N.tolist(), strict=True)), sums, task)

    with progress_bar(title, len(rows)) as bar:
        for batch, mine in ranks.deal(_batches(rows, batch_size, batch_tokens)):
            portions.run(batch, partial(score, mine=mine))
            bar.advance(len(batch) * ranks.world_size())
    if ranks.world_size() > 1:  # a choice was scored by one rank and is zero on the others
        parts = ranks.gathered(sums)
        sums = [[sum(values) for values in zip(*(part[i] for part in parts), strict=True)] for i in range(len(sums))]
    strip = len(task.delimiter)
    return [
        ScoredItem(
            item=item,
            loglikelihoods=tuple(sums[i]),
            num_tokens=tuple(choice.num_scored for choice in encoded[i]),
            num_chars=tuple(len(text) - strip for text in item.continuations),
            num_bytes=tuple(len(text[strip:].encode()) for text in item.continuations),
        )
        for i, item in enumerate(task.items)
    ]


def _add_up(batch: Sequence[_Row], found: dict, sums: list[list[float]], task: ChoiceTask) -> None:
    """Add the log-probability of every scored token, by (row, place, target), to its choice."""
    for b, row in enumerate(batch):
        values = [found[b, place, target] for place, target, _ in row.scored]
        check_finite(torch.tensor(values), f"task {task.name}, question '{task.items[row.item].id}'")
        for (_, _, number), value in zip(row.scored, values, strict=True):
            sums[row.item][number] += value
