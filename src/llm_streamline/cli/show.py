"""Commands that draw finished runs: `report` one, `compare` many."""

from pathlib import Path
from typing import Annotated

import typer

from llm_streamline.cli import terminal


def report(out: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]) -> None:
    """Write the report page again, from the files of a run."""
    from llm_streamline.report.html import write_report

    print(write_report(out))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or results files.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write (.html).")] = None,
) -> None:
    """Many runs in one table and one page: differences of settings, then quality against size and speed."""
    from llm_streamline.report.compare import write_comparison
    from llm_streamline.report.run import load_run
    from llm_streamline.report.tables import comparison_tables

    for table in comparison_tables([load_run(run) for run in runs]):
        terminal.console().print(table)
    if out:
        print(write_comparison(runs, out))
