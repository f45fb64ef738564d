"""One logger, one progress bar, one place that decides how loud they are.

Progress and messages go to stderr; stdout carries answers only, so that `--json` can be piped.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOGGER_NAME = "llm_streamline"
_console = Console(stderr=True)
_quiet = True  # a library is silent until its user asks for output; the command line asks


def get_logger(name: str = LOGGER_NAME) -> logging.Logger:
    """Return the package's logger or a child of it."""
    return logging.getLogger(name)


def set_verbosity(level: int) -> None:
    """Choose how much is said: -1 only errors and no bar, 0 the normal steps, 1 details, 2 everything."""
    global _quiet
    _quiet = level < 0
    logger = get_logger()
    logger.handlers.clear()
    logger.addHandler(RichHandler(console=_console, show_path=False, show_time=False, show_level=level > 0))
    logger.setLevel({-1: logging.ERROR, 0: logging.INFO}.get(level, logging.DEBUG))
    logger.propagate = False
    _hush_libraries(level)


def _hush_libraries(level: int) -> None:
    # transformers warns once a process about things we handle ourselves; its voice returns with -v
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        (transformers_logging.set_verbosity_warning if level > 0 else transformers_logging.set_verbosity_error)()
        transformers_logging.disable_progress_bar()


class Bar:
    """A step's progress: `advance` by some amount, `note` a short remark at the end of the line."""

    def __init__(self, progress: Progress | None, task: int | None):
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Move on by `amount`, in the unit the bar was opened with."""
        if self._progress is not None:
            self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Show `text` after the times, replacing the previous note."""
        if self._progress is not None:
            self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(title: str, total: float | None) -> Iterator[Bar]:
    """Open a bar on stderr for one step; silent when verbosity is below normal or stderr is no terminal."""
    if _quiet or not _console.is_terminal:
        if not _quiet:
            get_logger().info(title)
        yield Bar(None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console, transient=True) as progress:
        yield Bar(progress, progress.add_task(title, total=total, note=""))
