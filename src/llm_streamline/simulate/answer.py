"""What `llm-streamline simulate` answers: plain data, and its tables on the terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llm_streamline.config import Recipe
from llm_streamline.errors import ConfigError
from llm_streamline.simulate.devices import (
    CALL_SECONDS,
    FLOPS_SHARE,
    LINK_SHARE,
    MEMORY_SHARE,
    Device,
    find_device,
    measure_device,
)
from llm_streamline.simulate.run import SCALING, Simulation, simulate
from llm_streamline.simulate.shape import find_config, shape_of
from llm_streamline.simulate.task import Task

HERE = "here"


def simulate_run(
    model: str,
    recipe: Recipe,
    *,
    sizes: Sequence[str] = (),
    rates: str = "h100-sxm",
    devices: int = 1,
    shard: bool = False,
    scaling: bool = False,
) -> dict[str, Any]:
    """Simulate one run of `compress`, or the same run on 1 to 64 devices.

    Args:
        model: folder, config.json, model type, Hub id, .gguf file or `demo`; weights need not be there.
        recipe: budgets, target, network, objective.
        sizes: KEY=VALUE settings laid over the config.
        rates: a device of the table, or `here`.
        devices: how many, one process each.
        shard: the original's weights are split over the devices.
        scaling: also on 1, 2, 4 ... 64 devices.

    Raises:
        StreamlineError: no such model, device, target or size.
    """
    if rates != HERE:
        find_device(rates)  # a wrong name is told before a config is looked for
    config = find_config(model, sizes)
    shape = shape_of(config, recipe.dtype)
    if shape.max_positions and recipe.text.seq_len > shape.max_positions:
        raise ConfigError(
            f"windows of {recipe.text.seq_len} tokens are longer than the model's {shape.max_positions} positions; "
            f"use --seq-len {shape.max_positions} or less"
        )
    task = Task.of(shape, recipe)
    if rates == HERE:
        names = {2: "bfloat16", 4: "float32"}
        dtype = names[shape.element_bytes] if recipe.dtype == "auto" else recipe.dtype
        batch = max(recipe.text.seq_len, recipe.calibration.batch_tokens)
        device = measure_device(config, dtype, batch, recipe.text.seq_len, recipe.device)
    else:
        device = find_device(rates)
    run = simulate(task, device, devices, sharded=shard)
    task = task.settled(device.memory, shard and devices > 1)
    answer = {
        "model": {
            "name": model,
            "model_type": shape.model_type,
            "num_layers": shape.num_layers,
            "parameters": shape.parameters,
            "weight_bytes": shape.weight_bytes,
            "kv_bytes_per_token_at_most": shape.kv_bytes_per_token,
            "note": shape.note,
        },
        "span": [task.start, task.stop],
        "parameters_after": task.parameters_after,
        "trainable": task.recipe.training.trainable if task.is_trained else None,
        "parameters_trained": task.parameters_trained,
        "rates": asdict(device),
        "assumptions": assumptions(device),
        **summary(run),
        "stages": [asdict(stage) for stage in run.stages],
    }
    if scaling:
        runs = [simulate(task, device, count, sharded=shard) for count in SCALING]
        answer["scaling"] = [
            {**summary(one), "speed_up": runs[0].seconds / one.seconds, "train_seconds": stage_seconds(one, "train")}
            for one in runs
        ]
    return answer


def summary(run: Simulation) -> dict[str, Any]:
    """Totals of a simulation."""
    return {
        "devices": run.num_devices,
        "sharded": run.sharded,
        "seconds": run.seconds,
        "flops": sum(stage.flops for stage in run.stages),
        "memory_bytes": run.memory_bytes,
        "fits": run.fits,
    }


def stage_seconds(run: Simulation, name: str) -> float:
    """Seconds of the stages called `name`; 0 when there is none."""
    return sum(stage.seconds for stage in run.stages if stage.stage == name)


def assumptions(device: Device) -> list[str]:
    """What the numbers rest on, one sentence each."""
    rates = (
        ["Rates are those of this machine, measured on layers of this config with random weights."]
        if device.is_measured
        else [
            f"Matrix products reach {FLOPS_SHARE:.0%} of the stated peak, what lies between them {MEMORY_SHARE:.0%} of "
            f"the stated bandwidth, links {LINK_SHARE:.0%} of one direction; these shares are assumed.",
            f"Starting one layer from Python takes {CALL_SECONDS * 1e3:.1f} ms, hidden behind the work before it.",
        ]
    )
    return [
        *rates,
        "Work is shared in whole batches, a training step in whole windows; a step grows when there are more devices "
        "than windows in it.",
        "Gradients are exchanged after the backward, not during it: an upper bound.",
        "Saving, proving, generation and the speed measurement run on one device while the others wait.",
        "Without --span the span lies in the middle of the model.",
        "trainable auto is decided as on the machine itself: every layer above the replacement trains too where the "
        f"weights and what is trained fit into half of a device's {device.memory / 1e9:.0f} GB.",
        "Reading and tokenising text is not counted.",
    ]


def print_simulation(answer: dict[str, Any]) -> None:
    """Print the tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    screen, model = Console(), answer["model"]
    print(
        f"{model['name']}: {model['num_layers']} layers, {model['parameters'] / 1e9:.2f} B parameters; layers "
        f"[{answer['span'][0]}, {answer['span'][1]}) leave, {answer['parameters_after'] / 1e9:.2f} B remain, "
        f"{answer['parameters_trained'] / 1e6:.1f} M are trained"
        + (f" (trainable: {answer['trainable']})" if answer["trainable"] else "")
    )
    if model["note"]:
        print(f"note: compress refuses this model: {model['note']}")
    table = Table(title=f"{answer['devices']} x {answer['rates']['name']}")
    for name in ("stage", "time", "10^12 operations", "GB moved", "GB exchanged", "GB memory", "at work"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in answer["stages"]:
        table.add_row(
            stage["stage"],
            in_words(stage["seconds"]),
            f"{stage['flops'] / 1e12:,.1f}",
            f"{stage['bytes_moved'] / 1e9:,.1f}",
            f"{stage['bytes_exchanged'] / 1e9:,.2f}",
            f"{stage['memory_bytes'] / 1e9:.2f}",
            str(stage["devices_at_work"]),
        )
    table.add_section()
    table.add_row(
        "all", in_words(answer["seconds"]), f"{answer['flops'] / 1e12:,.1f}", "", "",
        f"{answer['memory_bytes'] / 1e9:.2f}", "",
    )  # fmt: skip
    screen.print(table)
    if not answer["fits"]:
        print(
            f"needs {answer['memory_bytes'] / 1e9:.0f} GB on a device of {answer['rates']['memory'] / 1e9:.0f} GB; "
            "use --shard with more --devices, a smaller batch, or --max-memory on the run itself"
        )
    if "scaling" in answer:
        curve = Table(title="the same run on more devices")
        for name in ("devices", "time", "speed-up", "training", "GB memory"):
            curve.add_column(name, justify="right")
        for row in answer["scaling"]:
            curve.add_row(*scaling_row(row))
        screen.print(curve)
    print(f"rates: {answer['rates']['source']}")
    for sentence in answer["assumptions"]:
        print(f"* {sentence}")


def scaling_row(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the scaling table."""
    return (
        str(row["devices"]),
        in_words(row["seconds"]),
        f"{row['speed_up']:.1f}",
        in_words(row["train_seconds"]),
        f"{row['memory_bytes'] / 1e9:.1f}",
    )


def in_words(seconds: float) -> str:
    """Seconds, minutes or hours, with three digits."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.3g} h"
