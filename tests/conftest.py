"""What every test needs: no network, one thread, quiet libraries, and `tests/` importable (`from tiny import ...`)."""

import logging
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on more threads, and sums stay the same
sys.path.insert(0, str(Path(__file__).parent))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from recording import pytest_addoption, pytest_runtest_logreport, pytest_sessionfinish  # noqa: F401 - hooks


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers():
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _own_loudness():
    """Every test hears the package as a library is heard, whatever a command or a shared fixture chose before."""
    from llm_streamline import logs

    logger = logs.get_logger()
    logger.propagate, logger.disabled = True, False
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logs._quiet = True
