"""The command line: parse, call one library function, print. The answer goes to stdout, progress to stderr.

Exit codes: 0 done; 1 the run or a check failed; 2 the input was refused; 130 and 143 it was told to stop by SIGINT or
SIGTERM, and goes on when the same command is given again. Heavy imports are inside the commands, so that
`--help` answers at once. The commands are in the modules beside this one, a group each.
"""

import os
import shlex
import sys
from typing import Annotated

import typer

from llm_streamline import interrupt, logs, ranks
from llm_streamline.cli import compress, decide, edit, evaluate, hand_over, leaderboard, lists, show, simulate
from llm_streamline.errors import StreamlineError
from llm_streamline.version import __version__

_COMMANDS = (  # in the order in which --help lists them
    compress.compress,
    decide.analyze,
    decide.plan,
    edit.apply,
    edit.train,
    evaluate.evaluate,
    evaluate.stability,
    show.report,
    show.compare,
    leaderboard.leaderboard,
    hand_over.export,
    hand_over.push,
    simulate.simulate,
    lists.architectures,
    lists.methods,
    compress.demo,
)
_LOUDNESS = ("-q", "--quiet", "-v", "-vv", "--verbose")
app = typer.Typer(
    help=(
        "Make a large language model smaller: remove the layers it does not need, train a lightweight network in their "
        "place, prove that the result loads and generates, and say what was lost."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in _COMMANDS:
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llm-streamline {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="More; twice for everything.")] = 0,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    logs.set_verbosity(-1 if quiet or not ranks.is_main() else verbose)


def main() -> None:
    """Entry point: one sentence for what the user can mend, a traceback only for our own mistakes."""
    loudness = [word for word in sys.argv[1:] if word in _LOUDNESS]
    others = [word for word in sys.argv[1:] if word not in _LOUDNESS]
    if not ranks.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - rank 0 gives the answer
    try:
        with interrupt.watched():
            app(args=[*loudness, *others], standalone_mode=True)  # -q and -v are understood wherever they stand
    except StreamlineError as problem:
        if ranks.first_to_fail():
            print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        sys.exit(problem.exit_code)
    except interrupt.Stopped as stopped:
        again = shlex.join(word for word in sys.argv[1:] if word != "--fresh")
        if stopped.agreed:
            tells = ranks.is_main() and not ranks.somebody_failed()
        else:  # each where it is: the others fail when the first is gone, or the launcher ends them
            tells = ranks.first_to_fail()
        if tells:
            print(f"stopped by {stopped.name}; to go on: llm-streamline {again}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except Exception as problem:
        if not ranks.first_to_fail():  # another rank failed, and told why; this one only misses it
            sys.exit(1)
        if (sentence := _out_of_memory(problem)) is None:
            raise
        print(f"OutOfMemoryError: {sentence}", file=sys.stderr, flush=True)
        sys.exit(StreamlineError.exit_code)


def _out_of_memory(problem: Exception) -> str | None:
    """What to say when memory ended where no batch could be made smaller; None when it was something else."""
    if not isinstance(problem, MemoryError):
        if "torch" not in sys.modules:
            return None
        from llm_streamline.memory_limits import is_out_of_memory

        if not is_out_of_memory(problem):
            return None
    said = (str(problem).splitlines() or ["no more to be had"])[0]
    return (
        f"out of memory ({said}); keep layers on disk with --max-memory auto, shorten text.seq_len, or use a machine "
        "with more memory"
    )
