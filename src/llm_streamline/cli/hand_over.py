"""Commands that give a finished run away: `export` in another format, `push` to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal


def export(
    run: Annotated[
        str,
        typer.Argument(help="Folder of a run; a plan.json for --slices; a .gguf file for --plan.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File (for --onnx folder) to write.", show_default=False)],
    gguf: Annotated[
        str | None, typer.Option("--gguf", help="F32, F16, BF16, Q8_0, Q4_0, ...: a GGUF file of that type.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="A folder with an ONNX model, checked with ONNX Runtime.")
    ] = False,
    slices: Annotated[bool, typer.Option("--slices", help="mergekit's slices, for a run that only removes.")] = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Cut a GGUF file by this plan without leaving the format.")
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Write a run as a GGUF file, an ONNX model or mergekit slices, or cut a GGUF file by a plan."""
    from llm_streamline.errors import ConfigError

    if sum((gguf is not None, onnx, slices, plan is not None)) != 1:
        raise ConfigError("export wants exactly one of --gguf TYPE, --onnx, --slices, --plan FILE")
    if slices:
        from llm_streamline.export.slices import to_slices
        from llm_streamline.export.whole_file import new_file

        text = to_slices(terminal.plan_of(run))
        with new_file(out) as path:
            path.write_text(text, encoding="utf-8")
        answer = {"out": str(out)}
    elif plan is not None:
        from llm_streamline.export.gguf_cut import cut_gguf
        from llm_streamline.plan import Plan

        answer = terminal.export_answer(cut_gguf(run, out, Plan.load(plan)))
    elif onnx:
        from llm_streamline.export.onnx import export_onnx

        answer = terminal.export_answer(export_onnx(run, out))
    else:
        from llm_streamline.export.gguf import export_gguf

        answer = terminal.export_answer(export_gguf(run, out, gguf))
    if as_json:
        terminal.print_json(answer)
    else:
        print(" ".join(f"{name}: {value}" for name, value in answer.items()))


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Hub repository: name or user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
) -> None:
    """Upload a finished run to the Hub, with its model card."""
    from llm_streamline.export.hub import push as upload

    print(upload(run, repo, private))
