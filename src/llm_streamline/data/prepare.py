"""From text to the windows of every role: one pass over the mixture, split by document hash, written as it is read."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.data.mixture import Draw, Shelf, seed_for
from llm_streamline.data.spec import parse_spec
from llm_streamline.data.splits import ROLES, SHARES
from llm_streamline.data.text import TextSource, open_text, text_hash
from llm_streamline.data.tokens import Boundaries, encode_documents, tokenizer_hash
from llm_streamline.data.windows import Windows, WindowWriter
from llm_streamline.errors import ConfigError, TextError
from llm_streamline.logs import get_logger, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PATIENCE = 256  # times the tokens asked for: a model writes on for ever, though none of it may fill a window
FORMAT = 1  # raised when the same request would give other windows than before
_log = get_logger(__name__)


@dataclass(frozen=True)
class WindowNeed:
    """How much one role needs."""

    num_tokens: int  # rounded up to whole windows
    seq_len: int  # tokens in a window

    def __post_init__(self):
        if self.num_tokens < 1 or self.seq_len < 2:
            raise ConfigError(
                f"windows need at least 1 token in all and 2 in each, got {self.num_tokens} and {self.seq_len}"
            )

    @property
    def num_windows(self) -> int:
        """Windows that hold `num_tokens`."""
        return math.ceil(self.num_tokens / self.seq_len)


def prepare_windows(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    needs: Mapping[str, WindowNeed],
    *,
    seed: int = 0,
    folder: Path | None = None,
    model: "PreTrainedModel | None" = None,
    across_documents: bool = True,
) -> dict[str, Windows]:
    """Make the windows of each role from a mixture of texts.

    The roles' documents are disjoint (`splits.role_of`), copies count once, near-empty documents not at all. What a
    role gets depends on the texts, the tokenizer, the role's own need and the seed, and on nothing else; the roles that
    judge (validation, evaluation) ignore the seed.

    Args:
        specs: text specifications (`parse_spec`); their weights are shares of the tokens.
        tokenizer: of the model the windows are for.
        needs: role -> how much; roles are calibration, train, validation, evaluation.
        seed: of the order documents come in, and of what the model writes for `self`.
        folder: write ROLE.safetensors and ROLE.json there and map them into memory; a set that is there already, made
            from the same request and unchanged texts, is used again. None keeps the tokens in memory.
        model: writes the text of `self`.
        across_documents: whether a window may hold several documents, one after the other; False cuts every window from
            a single document and drops what does not fill one.

    Returns:
        Role -> windows. There are fewer windows than asked for where the text is short; `provenance["passes"]` tells
        how often these must be gone through to see as many tokens.

    Raises:
        TextError: if a text cannot be read, or is too short for one window of a role.
        OutputError: if the folder cannot be written.
    """
    if unknown := set(needs) - set(ROLES):
        raise ConfigError(f"no role '{min(unknown)}'; roles are {', '.join(ROLES)}")
    if not specs:
        raise ConfigError("no text given; name at least one source, for example builtin")
    parsed = [parse_spec(spec) for spec in specs]
    sources = [open_text(spec, model=model, tokenizer=tokenizer, seed=seed) for spec in parsed]
    maker = _Maker(sources, tokenizer, seed, across_documents, folder)
    return maker.make(needs)


class _Maker:
    """What all roles of one call share."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        across_documents: bool,
        folder: Path | None,
    ):
        self._sources, self._seed, self._across, self._folder = sources, seed, across_documents, folder
        self._boundaries = Boundaries.of(tokenizer)
        self._encode = lambda texts: encode_documents(texts, tokenizer, self._boundaries)
        self._seen: set[bytes] = set()
        self._common = {
            "format": FORMAT,
            "specs": [source.spec.text for source in sources],
            "fingerprints": [text_hash(source.fingerprint) for source in sources],
            "tokenizer": tokenizer_hash(tokenizer),
            **self._boundaries.record(tokenizer),
            "packing": "windows run across documents" if across_documents else "a window holds one document",
            "split": {"by": "sha256 of the white-space-normalised document", "shares": dict(SHARES)},
        }

    def make(self, needs: Mapping[str, WindowNeed]) -> dict[str, Windows]:
        """Reuse what is there and make the rest, the smallest need first: it decides how little is kept waiting."""
        made = {role: found for role, need in needs.items() if (found := self._find(role, need)) is not None}
        for windows in made.values():
            self._seen.update(row.tobytes() for row in windows.document_hashes.numpy())
        missing = sorted(needs.keys() - made.keys(), key=lambda role: (needs[role].num_tokens, role))
        shelves = [Shelf(source, missing, self._seed) for source in self._sources]
        total = sum(needs[role].num_windows * needs[role].seq_len for role in missing)
        with progress_bar("Reading text", total or None) as bar:
            for role in missing:
                made[role] = self._make_one(role, needs[role], shelves, bar.advance)
                for shelf in shelves:
                    shelf.close(role)
        return {role: made[role] for role in needs}

    def _key(self, role: str, need: WindowNeed) -> str:
        request = {"role": role, "num_windows": need.num_windows, "seq_len": need.seq_len}
        weights = [source.spec.weight for source in self._sources]
        content = self._common | request | {"weights": weights, "seed": seed_for(role, self._seed)}
        del content["specs"]  # another way to write the same text
        return text_hash(json.dumps(content, sort_keys=True))

    def _find(self, role: str, need: WindowNeed) -> Windows | None:
        """The set a former call left in the folder, if it was made from the same request."""
        if self._folder is None or not (self._folder / f"{role}.json").exists():
            return None
        try:
            windows = Windows.load(self._folder / role)
        except TextError as problem:
            _log.debug("%s: made anew", problem)
            return None
        return windows if windows.provenance.get("key") == self._key(role, need) else None

    def _make_one(self, role: str, need: WindowNeed, shelves: Sequence[Shelf], advance) -> Windows:
        writer = WindowWriter(need.seq_len, need.num_windows, self._folder, self._across)
        draw = Draw(role, shelves, self._encode, need.num_windows * need.seq_len, self._seen)
        try:
            for document, ids, source in draw:
                before = writer.num_windows
                writer.add(ids, document.hash, source)
                advance((writer.num_windows - before) * need.seq_len)
                if writer.is_full or sum(draw.tokens) > _PATIENCE * need.num_windows * need.seq_len:
                    break
            if writer.num_windows == 0:
                raise TextError(self._too_little(role, need, draw))
            provenance = self._provenance(role, need, draw, writer)
            return writer.finish(provenance, self._folder / role if self._folder else None)
        finally:
            writer.close()

    def _provenance(self, role: str, need: WindowNeed, draw: Draw, writer: WindowWriter) -> dict[str, Any]:
        num_tokens = writer.num_windows * need.seq_len
        passes = max(1.0, need.num_windows / writer.num_windows)
        if passes > 1:
            again = f"; training goes through it {passes:.1f} times" if role == "train" else ""
            _log.warning("%s: the text gives %d of %d windows%s.", role, writer.num_windows, need.num_windows, again)
        sources = []
        for number, source in enumerate(self._sources):
            tokens = writer.tokens_of_source[number]
            sources.append(
                {
                    "spec": source.spec.text,
                    "asked_share": draw.shares[number],
                    "realised_share": tokens / num_tokens,
                    "tokens": tokens,
                    "documents": writer.documents_of_source[number],
                    "ran_dry": number in draw.dry,
                }
            )
        self._warn_of_shares(role, sources)
        return {
            **self._common,
            "role": role,
            "key": self._key(role, need),
            "seed": seed_for(role, self._seed),
            "seq_len": need.seq_len,
            "windows": writer.num_windows,
            "asked_windows": need.num_windows,
            "passes": passes,
            "tokens": num_tokens,
            "documents": writer.num_documents,
            "sources": sources,
            "left_out": {"near_empty": draw.num_near_empty, "duplicates": draw.num_duplicates},
        }

    @staticmethod
    def _warn_of_shares(role: str, sources: Iterable[Mapping[str, Any]]) -> None:
        for source in sources:
            if source["ran_dry"] and source["realised_share"] < 0.9 * source["asked_share"]:
                _log.warning(
                    "%s: %s ran dry, it gives %.0f %% of the tokens instead of %.0f %%.",
                    role, source["spec"], 100 * source["realised_share"], 100 * source["asked_share"],
                )  # fmt: skip

    def _too_little(self, role: str, need: WindowNeed, draw: Draw) -> str:
        names = " + ".join(source.spec.text for source in self._sources)
        found = sum(draw.tokens)
        longest = "" if self._across else " in one document"
        return (
            f"too little text for one {role} window: {need.seq_len} tokens{longest} are needed, and the "
            f"{SHARES[role]:.0%} of the documents that fall to {role} by their hashes hold {found} (text: {names}). "
            f"Give more text, some {math.ceil(1.5 * need.seq_len / SHARES[role] / 100) * 100} tokens in many documents "
            "at the least, or shorten the windows (seq_len)"
        )
