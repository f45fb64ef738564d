"""The command `simulate`: what a run would cost, without weights."""

from typing import Annotated

import typer

from llm_streamline.cli import options as o
from llm_streamline.cli import terminal


def simulate(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, config.json, model type with --size, Hub id, .gguf or `demo`; no weights are read.",
            show_default=False,
        ),
    ],
    size: Annotated[
        list[str] | None, typer.Option("--size", help="KEY=VALUE of the config; may be repeated.", metavar="KEY=VALUE")
    ] = None,
    rates: Annotated[
        str, typer.Option("--rates", help="Device of the table, or `here` to measure this machine.")
    ] = "h100-sxm",
    devices: Annotated[int, typer.Option("--devices", min=1, help="Devices, one process each.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="The original's weights are split over the devices.")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="The same run on 1, 2, 4 ... 64 devices.")] = False,
    layers: o.LayersOption = None,
    sparsity: o.SparsityOption = None,
    params: o.ParamsOption = None,
    count: o.CountOption = None,
    span: o.SpanOption = None,
    verify: o.VerifyOption = None,
    calibration_tokens: o.CalibrationOption = None,
    train_tokens: o.TrainTokensOption = None,
    seq_len: o.SeqLenOption = None,
    replacement: o.ReplacementOption = None,
    objective: o.ObjectiveOption = None,
    trainable: o.TrainableOption = None,
    recipe: o.RecipeOption = None,
    dtype: o.DtypeOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """What a run would cost, from the config alone: operations, bytes, time and memory on any number of devices."""
    wanted = o.recipe_of(locals())
    from llm_streamline.simulate.answer import print_simulation, simulate_run

    answer = simulate_run(model, wanted, sizes=size or (), rates=rates, devices=devices, shard=shard, scaling=scaling)
    if as_json:
        terminal.print_json(answer)
    else:
        print_simulation(answer)
