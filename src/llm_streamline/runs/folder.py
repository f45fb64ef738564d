"""The folder of a run: opened before anything is written, finished with report, card and manifest."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_streamline import ranks
from llm_streamline.config import Recipe
from llm_streamline.errors import OutputError, StreamlineError
from llm_streamline.files import disk_full_in_words
from llm_streamline.output import TOOL_FOLDER, check_output, claim, open_output, withdraw, write_manifest, write_text
from llm_streamline.plan import Plan
from llm_streamline.report.card import CARD_FILE, write_card
from llm_streamline.report.html import write_report
from llm_streamline.runs.ledger import Ledger
from llm_streamline.runs.lock import locked
from llm_streamline.runtime import versions
from llm_streamline.sources import ModelSource

WORK_FOLDER = "work"  # in the tool's: tokens and checkpoints, needed to go on after a kill, not part of the result


@dataclass(frozen=True)
class RunFolder:
    """An output folder that this process holds.

    Attributes:
        out: the folder.
        folder: what in it is the tool's.
        ledger: the stages that are done there.
    """

    out: Path
    folder: Path
    ledger: Ledger
    existed: bool
    was_ours: bool

    @contextmanager
    def taken_back_if_refused(self) -> Iterator[None]:
        """Around all that comes before the first stage: a refused input leaves nothing behind in a new folder.

        A full disk refuses no input: what was made so far is kept for the next start.
        """
        claimed = False
        try:
            # refused now rather than at the end, when it is not ours
            ranks.from_main(lambda: claim(self.out, [CARD_FILE]))
            claimed = True
            yield
        except StreamlineError as refusal:
            is_refused = refusal.exit_code == 2 and not (claimed and isinstance(refusal, OutputError))
            if is_refused and not self.was_ours and ranks.is_main():
                withdraw(self.out, existed=self.existed)
            raise


@contextmanager
def opened(path: str | Path, fresh: bool, source: ModelSource) -> Iterator[RunFolder]:
    """Open the output folder of a run and hold it until the run ends.

    Raises:
        OutputError: the folder is not ours, cannot be written, or another run is at work in it.
    """
    place = Path(path).expanduser()
    existed, was_ours = ranks.from_main(lambda: (place.exists(), (place / TOOL_FOLDER).exists()))
    out = ranks.from_main(lambda: check_output(path, source=protected(source)))
    with disk_full_in_words(out), locked(out / TOOL_FOLDER):
        out = ranks.from_main(lambda: open_output(path, fresh=fresh, source=protected(source)))
        yield RunFolder(out, out / TOOL_FOLDER, Ledger(out / TOOL_FOLDER), existed, was_ours)


def finish(out: Path, plan: Plan, recipe: Recipe, base: ModelSource, manifest: dict[str, Any]) -> Path:
    """Report and card, then the manifest, which makes the run a finished one; rank 0 alone writes them."""
    return ranks.from_main(lambda: _finish(out, plan, recipe, base, manifest))


def _finish(out: Path, plan: Plan, recipe: Recipe, base: ModelSource, manifest: dict[str, Any]) -> Path:
    folder = out / TOOL_FOLDER
    write_text(folder / "plan.json", plan.to_json())
    write_recipe(folder, recipe)
    content = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "plan_hash": plan.digest(),
        "versions": versions(),
        "stage_seconds": Ledger(folder).seconds,
        **manifest,
    }
    report = write_report(out, manifest=content)
    claim(out, [CARD_FILE])  # once more: what is published since is all that counts as ours
    write_card(out, base_card=_base_card(base))
    write_manifest(out, content)
    return report


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe with every default."""
    write_text(folder / "recipe.yaml", recipe.to_yaml())


def _base_card(source: ModelSource) -> str | None:
    """The original's model card, from which licence and language are inherited."""
    card = source.path / CARD_FILE
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None


def protected(source: ModelSource) -> Path | None:
    """The folder of the model that is read, which must not be written to."""
    return source.path if source.path.is_dir() else source.path.parent


def command_line() -> str:
    """The command that runs, as the user would type it."""
    return " ".join(["llm-streamline", *sys.argv[1:]]) if re.search("llm.streamline", sys.argv[0]) else "Python API"
