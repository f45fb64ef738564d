"""Which stages of a run's folder are done, and for what.

A stage that finished leaves its key (everything its result depends on) in `stages.json`; the same key again means that
its files are good as they are. So a killed run goes on where it was, and a changed recipe redoes only what it changes.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_streamline.output import write_json
from llm_streamline.version import __version__

LEDGER_FILE = "stages.json"  # of finished stages, in the run's tool folder


class Ledger:
    """Which stages of a folder are done, and for what."""

    def __init__(self, folder: Path):
        self._path = folder / LEDGER_FILE
        try:
            self._done: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._done = {}

    def is_done(self, stage: str, key: str) -> bool:
        """Whether `stage` was finished for exactly this key."""
        return self._done.get(stage, {}).get("key") == key

    @contextmanager
    def running(self, stage: str, key: str) -> Iterator[None]:
        """Record the stage as done, with its time, if the block ends well."""
        started = time.perf_counter()
        yield
        self._done[stage] = {"key": key, "seconds": round(time.perf_counter() - started, 2)}
        write_json(self._path, self._done)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage when it last ran."""
        return {stage: entry["seconds"] for stage, entry in self._done.items()}


def key_of(*parts: Any) -> str:
    """sha256 over plain data: equal when everything a stage depends on is equal."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
