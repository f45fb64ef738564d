"""Drawing documents for one role from several sources so that their tokens keep the shares asked for.

Each role draws from its own queues, in an order that depends on nothing but the sources, the role and its seed. So what
a role gets does not change with what other roles need, and a larger budget begins with the documents of a smaller one.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llm_streamline.data.document import Document
from llm_streamline.data.splits import SEEDED_ROLES, role_of
from llm_streamline.data.text import TextSource

_MIN_BATCH_CHARACTERS = 50_000  # enough documents at once to keep a fast tokenizer's threads busy
_MAX_BATCH_CHARACTERS = 400_000  # what a tokenizer hands back takes many times the memory of the text
_CHARACTERS_PER_TOKEN = 5  # a guess on the high side; only the size of batches depends on it


def seed_for(role: str, seed: int) -> int:
    """The seed a role's documents are chosen with: always 0 for the roles that results are judged on."""
    return seed if role in SEEDED_ROLES else 0


class Shelf:
    """One source, read block by block; each document is put on the pile of its role, shuffled within the block."""

    def __init__(self, source: TextSource, roles: Iterable[str], seed: int):
        self.source = source
        self._seed = seed
        self._piles: dict[str, deque[Document]] = {role: deque() for role in roles}
        self._shared = source.records()
        self._own: dict[str, Iterator[Document]] = {}  # streams of a source that writes for each role
        self._num_blocks = 0

    def next_document(self, role: str) -> Document | None:
        """The role's next document, near-empty ones and copies included; None when there are no more."""
        pile = self._piles[role]
        own = self._own_stream(role)
        if own is not None:
            return next(own, None)
        while not pile:
            if not self._read_block():
                return None
        return pile.popleft()

    def close(self, role: str) -> None:
        """Keep no more documents of this role: it has all it needs."""
        self._piles.pop(role).clear()
        self._own.pop(role, None)

    def _own_stream(self, role: str) -> Iterator[Document] | None:
        if role not in self._own:
            stream = self.source.records_for(role, seed_for(role, self._seed))
            if stream is None:
                return None
            self._own[role] = stream
        return self._own[role]

    def _read_block(self) -> bool:
        """Read on; False at the end of the source."""
        block: dict[str, list[Document]] = {role: [] for role in self._piles}
        num_characters = 0
        for document in self._shared:
            role = role_of(document.hash)
            if role in block:
                block[role].append(document)
            num_characters += len(document.text)
            if num_characters >= self.source.block_characters:
                break
        for role, documents in block.items():
            random.Random(f"{role} {seed_for(role, self._seed)} {self._num_blocks}").shuffle(documents)
            self._piles[role].extend(documents)
        self._num_blocks += 1
        return num_characters > 0


class Draw:
    """The documents of one role, tokenised, in the order of the mixture.

    The next document comes from the source furthest below its share of the tokens, counting half of the document it
    would add: shares are right to within half a document of each source, and a source whose share is less than that
    gives nothing. A source that runs dry leaves its share to the others.
    """

    def __init__(
        self,
        role: str,
        shelves: Sequence[Shelf],
        encode: Callable[[list[str]], list[np.ndarray]],
        num_tokens: int,
        seen: set[bytes],
    ):
        """Prepare to draw.

        Args:
            role: whose documents to draw.
            shelves: one for each source.
            encode: texts -> int32 token ids with boundary tokens.
            num_tokens: about how many will be drawn; only decides how many documents are tokenised at once.
            seen: hashes of documents already used; the ones drawn are added.
        """
        self._role, self._shelves, self._encode, self._seen = role, shelves, encode, seen
        self._num_tokens = num_tokens
        weights = [shelf.source.spec.weight for shelf in shelves]
        self.shares = [weight / sum(weights) for weight in weights]
        self._ready: list[deque[tuple[Document, np.ndarray]]] = [deque() for _ in shelves]
        self._live = set(range(len(shelves)))
        self.tokens = [0] * len(shelves)  # drawn from each source
        self.num_near_empty = 0
        self.num_duplicates = 0

    @property
    def dry(self) -> list[int]:
        """Numbers of the sources that had no more documents for this role."""
        return sorted(set(range(len(self._shelves))) - self._live)

    def __iter__(self) -> Iterator[tuple[Document, np.ndarray, int]]:
        """Yield (document, its ids, number of its source) until every source is dry."""
        while self._live:
            progress = {}
            for number in sorted(self._live):
                if self._find_unused(number):
                    half = len(self._ready[number][0][1]) / 2
                    progress[number] = (self.tokens[number] + half) / self.shares[number]
                else:
                    self._live.discard(number)
            if not progress:
                return
            number = min(progress, key=progress.__getitem__)
            document, ids = self._ready[number].popleft()
            self._seen.add(bytes.fromhex(document.hash))
            self.tokens[number] += len(ids)
            yield document, ids, number

    def _find_unused(self, number: int) -> bool:
        """Put a document that no one has used at the head of the source's queue; False when there is none left."""
        ready = self._ready[number]
        while ready or self._tokenise(number):
            if bytes.fromhex(ready[0][0].hash) not in self._seen:
                return True
            ready.popleft()
            self.num_duplicates += 1
        return False

    def _tokenise(self, number: int) -> bool:
        """Tokenise a batch of the source's documents; False when there are none left."""
        missing = (self._num_tokens - sum(self.tokens)) * self.shares[number] * _CHARACTERS_PER_TOKEN
        least = min(_MIN_BATCH_CHARACTERS, self._shelves[number].source.block_characters)  # what a model writes is dear
        room = min(max(missing, least), _MAX_BATCH_CHARACTERS)
        batch: list[Document] = []
        while room > 0 and (document := self._shelves[number].next_document(self._role)) is not None:
            if document.is_near_empty:
                self.num_near_empty += 1
                continue
            batch.append(document)
            room -= len(document.text)
        self._ready[number].extend(zip(batch, self._encode([d.text for d in batch]), strict=True))
        return bool(batch)
