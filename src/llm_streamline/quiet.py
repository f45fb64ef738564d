"""Silence for the bars and warnings that transformers shows while it loads and saves; our own voice is `logs.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and warnings; errors still show, and all is put back afterwards."""
    from transformers import modeling_gguf_pytorch_utils as gguf_converter
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    bar = getattr(gguf_converter, "tqdm", None)  # drawn whatever the verbosity, so replaced
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if bar is not None:
        gguf_converter.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
        if bar is not None:
            gguf_converter.tqdm = bar
