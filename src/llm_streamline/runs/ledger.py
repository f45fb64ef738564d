"""Which stages of a run's folder are done, for what, and with which files.

A stage that finished leaves in `stages.json` its key (everything its result depends on), the sha256 of each file it
made and the versions it ran with. The same key and the same files mean that it need not run again. So a killed run goes
on where it was, a changed recipe redoes only what it changes, and a damaged file only its stage. No decision looks at a
clock or at a file's times.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_streamline import interrupt, ranks
from llm_streamline.files import sha256_of, write_json
from llm_streamline.logs import get_logger
from llm_streamline.runtime import package_versions
from llm_streamline.version import __version__

LEDGER_FILE = "stages.json"  # of finished stages, in the run's tool folder
_BIT_MAKERS = ("torch", "transformers")  # another version of these may round differently
log = get_logger()


class Ledger:
    """The finished stages of one folder."""

    def __init__(self, folder: Path):
        """Read what earlier runs left.

        Args:
            folder: the run's tool folder; files are named relative to the folder above it.
        """
        self._path, self._out = folder / LEDGER_FILE, folder.parent
        self._done = ranks.from_main(lambda: _read(self._path))

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` was finished for exactly this key and all its files are as it left them; says what is not.

        Rank 0 looks; what it finds holds for all ranks.
        """
        return ranks.from_main(lambda: self._is_done(stage, key))

    def _is_done(self, stage: str, key: str) -> bool:
        if self.key(stage) != key:
            return False
        if damaged := self.damaged(stage):
            log.warning("%s was done before, but %s is damaged or missing: done again", stage, _few(damaged))
            return False
        before = self._done[stage].get("versions", {})
        if others := [f"{name} {before[name]}" for name, now in _versions().items() if before.get(name, now) != now]:
            log.warning("%s was done with %s; it is kept, --fresh does it again", stage, " and ".join(others))
        return True

    def key(self, stage: str) -> str | None:
        """The key that `stage` was last finished for; None if it never was."""
        return self._done.get(stage, {}).get("key")

    def damaged(self, stage: str) -> list[Path]:
        """The files of a finished stage that are missing or not what it wrote."""
        files = self._done.get(stage, {}).get("files", {})
        return [self._out / name for name, sha256 in files.items() if not _is_sound(self._out / name, sha256)]

    def is_intact(self, stages: Sequence[str]) -> bool:
        """Whether all these stages were finished and every file of each is as it was left; says what is not."""
        return ranks.from_main(lambda: self._is_intact(stages))

    def _is_intact(self, stages: Sequence[str]) -> bool:
        damaged = [path for stage in stages for path in self.damaged(stage)]
        if damaged:
            log.warning("%s is damaged or missing: what made it is done again", _few(damaged))
        return self._done.keys() >= set(stages) and not damaged

    @contextmanager
    def running(self, stage: str, key: str, started: float | None = None) -> Iterator[list[Path]]:
        """Record the stage as done if the block ends well, with its time and the files put into the yielded list.

        Args:
            stage: its name.
            key: everything its result depends on.
            started: `time.perf_counter()` when it began, if that was before the block.
        """
        interrupt.check()  # where a library swallowed the exception that the signal had become
        started = time.perf_counter() if started is None else started
        made: list[Path] = []
        yield made
        self._done[stage] = ranks.from_main(
            lambda: {
                "key": key,
                "seconds": round(time.perf_counter() - started, 2),
                "files": {path.relative_to(self._out).as_posix(): sha256_of(path) for path in made},
                "versions": _versions(),
            }
        )
        write_json(self._path, self._done)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage when it last ran."""
        return {stage: entry["seconds"] for stage, entry in self._done.items()}


def key_of(*parts: Any) -> str:
    """sha256 over plain data: equal when everything a stage depends on is equal."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        done = None
    if not isinstance(done, dict) or not all(_is_entry(entry) for entry in done.values()):
        log.warning("%s is damaged: what it recorded is done again", path)
        return {}
    return done


def _is_entry(entry: Any) -> bool:
    kinds = {"key": str, "seconds": float | int, "files": dict, "versions": dict}
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())


def _is_sound(path: Path, sha256: str) -> bool:
    try:
        return sha256_of(path) == sha256
    except OSError:
        return False


def _few(paths: list[Path]) -> str:
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


def _versions() -> dict[str, str]:
    return package_versions(_BIT_MAKERS)
