"""The folder of a run: opened before anything is written, finished with report, card and manifest."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_streamline import stages
from llm_streamline.config import Recipe
from llm_streamline.errors import StreamlineError
from llm_streamline.ledger import LEDGER_FILE, Ledger
from llm_streamline.output import TOOL_FOLDER, claim, open_output, withdraw, write_manifest, write_text
from llm_streamline.plan import Plan
from llm_streamline.report.card import write_card
from llm_streamline.report.html import write_report
from llm_streamline.runtime import versions
from llm_streamline.sources import ModelSource


@contextmanager
def opened(path: str | Path, fresh: bool, source: ModelSource) -> Iterator[Path]:
    """The output folder; when the input is refused before any stage is done, what was written is taken back."""
    existed, was_ours = Path(path).expanduser().exists(), (Path(path).expanduser() / TOOL_FOLDER).exists()
    out = open_output(path, fresh=fresh, source=protected(source))
    try:
        claim(out, ["README.md"])  # refused now rather than at the end, when it is not ours
        yield out
    except StreamlineError as refusal:
        if refusal.exit_code == 2 and not was_ours and not (out / TOOL_FOLDER / LEDGER_FILE).exists():
            withdraw(out, existed=existed)
        raise


def finish(out: Path, plan: Plan, recipe: Recipe, base: ModelSource, manifest: dict[str, Any]) -> Path:
    """Report and card, then the manifest, which makes the run a finished one."""
    folder = out / TOOL_FOLDER
    write_text(folder / "plan.json", plan.to_json())
    stages.write_recipe(folder, recipe)
    content = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "plan_hash": plan.digest(),
        "versions": versions(),
        "stage_seconds": Ledger(folder).seconds,
        **manifest,
    }
    report = write_report(out, manifest=content)
    claim(out, ["README.md"])  # once more: what is published since is all that counts as ours
    write_card(out, base_card=_base_card(base))
    write_manifest(out, content)
    return report


def _base_card(source: ModelSource) -> str | None:
    """The original's model card, from which licence and language are inherited."""
    card = source.path / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None


def protected(source: ModelSource) -> Path | None:
    """The folder of the model that is read, which must not be written to."""
    return source.path if source.path.is_dir() else source.path.parent


def command_line() -> str:
    """The command that runs, as the user would type it."""
    return " ".join(["llm-streamline", *sys.argv[1:]]) if "llm-streamline" in sys.argv[0] else "Python API"
