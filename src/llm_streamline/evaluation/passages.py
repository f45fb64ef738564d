"""The `continuation` task: multiple choice made of any text, no labels and no download needed.

A passage of the text is shown; its true continuation stands against three continuations taken from elsewhere in the
same text. Knowing the topic does not suffice where one document is long enough to give all four.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llm_streamline.errors import TextError
from llm_streamline.evaluation.items import ChoiceTask, Item

CONTEXT_WORDS = 48
CONTINUATION_WORDS = 16
NUM_WRONG = 3
NUM_ITEMS = 200
_OWN_DOCUMENT_BLOCKS = 8  # with so many passages, wrong continuations come from the same document
_CANDIDATES = 12  # wrong continuations drawn, of which the three of nearest length are taken
_MAX_CHARACTERS = 4_000_000  # of text read; a longer source is used up to here


@dataclass(frozen=True)
class _Block:
    name: str
    document: int
    context: str
    continuation: str


def continuation_task(
    texts: Iterable[str], *, name: str = "continuation", num_items: int | None = None, seed: int = 0
) -> ChoiceTask:
    """Make a multiple-choice task of some texts.

    Each text is cut into blocks of 64 words, 48 of context and 16 of continuation; some blocks are drawn as questions.

    Args:
        texts: documents, in a fixed order.
        name: name of the task.
        num_items: questions, fewer if the text does not give so many; None: 200.
        seed: of the choice of passages, of the wrong continuations and of where the true one stands.

    Raises:
        TextError: the text gives fewer than four passages.
    """
    blocks = _blocks(texts)
    if len(blocks) <= NUM_WRONG:
        words = CONTEXT_WORDS + CONTINUATION_WORDS
        raise TextError(
            f"task {name}: the text has {len(blocks)} passages of {words} words, but at least {NUM_WRONG + 1} are "
            f"needed. Give at least {(NUM_WRONG + 1) * words} words in documents of {words} words or more."
        )
    rng = random.Random(f"{seed} {name}")
    chosen = sorted(rng.sample(range(len(blocks)), min(num_items or NUM_ITEMS, len(blocks))))
    by_document: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        by_document.setdefault(block.document, []).append(number)
    items = []
    for number in chosen:
        near = by_document[blocks[number].document]
        pool = near if len(near) >= _OWN_DOCUMENT_BLOCKS else range(len(blocks))
        item = _question(blocks, number, pool, rng)
        if item is not None:
            items.append(item)
    if not items:
        raise TextError(f"task {name}: the text repeats itself so much that no passage has three other continuations.")
    return ChoiceTask(name, tuple(items))


def _blocks(texts: Iterable[str]) -> list[_Block]:
    blocks: list[_Block] = []
    characters = 0
    for document, text in enumerate(texts):
        words = [match.span() for match in re.finditer(r"\S+", text)]
        size = CONTEXT_WORDS + CONTINUATION_WORDS
        for at in range(0, len(words) - size + 1, size):
            begin, middle = words[at][0], words[at + CONTEXT_WORDS][0]
            last_of_context, end = words[at + CONTEXT_WORDS - 1][1], words[at + size - 1][1]
            blocks.append(
                # white space between the two becomes one space, so that it does not give the true one away
                _Block(f"{document}-{at}", document, text[begin:last_of_context], " " + text[middle:end])
            )
        characters += len(text)
        if characters > _MAX_CHARACTERS:
            break
    return blocks


def _question(blocks: Sequence[_Block], number: int, pool: Sequence[int], rng: random.Random) -> Item | None:
    """Make one question; None when the pool has not three other continuations."""
    true = blocks[number].continuation
    drawn = rng.sample(pool, min(len(pool), _CANDIDATES + 1))
    others = list(dict.fromkeys(blocks[i].continuation for i in drawn if blocks[i].continuation != true))
    wrong = sorted(others, key=lambda text: abs(len(text) - len(true)))[:NUM_WRONG]
    if len(wrong) < NUM_WRONG:
        return None
    gold = rng.randrange(NUM_WRONG + 1)
    rng.shuffle(wrong)
    choices = (*wrong[:gold], true, *wrong[gold:])
    return Item(blocks[number].name, (blocks[number].context,) * len(choices), choices, gold)


def texts_of_windows(packed, tokenizer) -> list[str]:
    """Return the texts in packed windows (`data.Windows`), one for each document; special tokens are left out."""
    tokens: dict[int, list[int]] = {}
    for ids, documents in zip(packed.input_ids, packed.document_ids, strict=True):
        for token, document in zip(ids.tolist(), documents.tolist(), strict=True):
            tokens.setdefault(int(document), []).append(int(token))
    return [tokenizer.decode(one, skip_special_tokens=True) for one in tokens.values()]
