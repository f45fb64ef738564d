"""The command line as one of several ranks, for `torchrun tests/rank_script.py COMMAND ...`.

The proof's fresh process is run inside this one: another import of torch takes longer than everything else here.
FAIL_RANK=n makes rank n fail while it measures.
"""

import os
from pathlib import Path
from types import SimpleNamespace

from llm_streamline import proof, ranks
from llm_streamline.cli import main
from llm_streamline.errors import NumericsError
from llm_streamline.reload import answer
from llm_streamline.stages import measure


def _answer_here(command, **_):
    answer(Path(command[-1]))
    return SimpleNamespace(returncode=0, stderr="")


def _failing(*_, **__):
    raise NumericsError("layer 3 is not finite on this rank alone")


if __name__ == "__main__":
    proof.subprocess.run = _answer_here
    if os.environ.get("FAIL_RANK") == str(ranks.rank()):
        measure.observe = _failing
    main()
