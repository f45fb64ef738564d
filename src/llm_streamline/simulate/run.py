"""From work and device rates to seconds and bytes for any number of devices: the simulator itself. No torch here.

Matrix products wait for their weights or for the arithmetic, whichever is slower; what lies between them waits for
memory; an accelerator starts layers while others run, a processor does not. Nothing else overlaps, so communication is
an upper bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_streamline.simulate.devices import Device
from llm_streamline.simulate.task import Task
from llm_streamline.simulate.work import Work, work_of

DEVICES_PER_MACHINE = 8
SCALING = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class StageCost:
    """One stage on some devices."""

    stage: str
    seconds: float
    flops: float  # of all devices
    bytes_moved: float  # between memory and processor, all devices
    bytes_exchanged: float  # sent by each device
    memory_bytes: float  # of the fullest device
    devices_at_work: int


@dataclass(frozen=True)
class Simulation:
    """A whole run."""

    device: Device
    num_devices: int
    sharded: bool
    stages: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        """Of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> float:
        """The fullest device's peak."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return self.memory_bytes <= self.device.memory


def simulate(task: Task, device: Device, num_devices: int = 1, *, sharded: bool = False) -> Simulation:
    """Simulate `compress` on a number of equal devices.

    Args:
        task: model, recipe, span.
        device: rates.
        num_devices: processes, one device each.
        sharded: the original's weights are split over the devices (FSDP) and gathered layer by layer.
    """
    task = task.settled(device.memory, sharded and num_devices > 1)
    costs = tuple(_cost(work, device, num_devices, sharded, task) for work in work_of(task))
    return Simulation(device, num_devices, sharded, costs)


def scaling(task: Task, device: Device, counts: Sequence[int] = SCALING, *, sharded: bool = False) -> list[Simulation]:
    """The same run on more and more devices (strong scaling)."""
    return [simulate(task, device, count, sharded=sharded) for count in counts]


def _cost(work: Work, device: Device, num_devices: int, sharded: bool, task: Task) -> StageCost:
    batches, share, steps = _portion(work, num_devices)
    at_work = min(num_devices, max(1, round(1 / share))) if work.shared else 1
    arithmetic = share * work.flops / device.flops
    weights = batches * work.weight_bytes / device.memory_bandwidth
    between = share * work.activation_bytes / device.memory_bandwidth
    calls = batches * work.calls * device.call_seconds
    busy = max(arithmetic, weights) + between
    busy = max(busy, calls) if device.overlaps else busy + calls
    exchanged = _reduced(work.reduced_bytes, num_devices) * steps + _reduced(work.gathered_bytes, num_devices)
    messages = (steps if work.reduced_bytes else 0) + (1 if work.gathered_bytes else 0)
    talk = _reduce_seconds(work.reduced_bytes, device, num_devices) * steps
    talk += _reduce_seconds(work.gathered_bytes, device, num_devices)
    talk += messages * device.latency * math.log2(num_devices) if num_devices > 1 else 0.0
    memory = work.memory_bytes
    if sharded and num_devices > 1 and work.weights_held:
        gathered = batches * work.weights_held * (num_devices - 1) / num_devices
        busy = max(busy, gathered / _link(device, num_devices))  # a layer is gathered while the one before it runs
        exchanged += gathered
        two_layers = 2 * max(layer.parameters for layer in task.shape.layers) * task.shape.element_bytes
        memory += work.weights_held / num_devices + two_layers - work.weights_held
    disk = work.disk_bytes / device.disk
    return StageCost(
        stage=work.stage,
        seconds=busy + talk + disk,
        flops=work.flops,
        bytes_moved=work.activation_bytes + work.batches * work.weight_bytes,
        bytes_exchanged=exchanged,
        memory_bytes=memory,
        devices_at_work=at_work,
    )


def _portion(work: Work, num_devices: int) -> tuple[float, float, float]:
    """Batches that one device runs, its share of all work, and optimiser steps (0 outside training)."""
    if not work.shared or (num_devices == 1 and not work.step_windows):
        return work.batches, 1.0, 0.0
    if not work.step_windows:
        batches = math.ceil(work.batches / num_devices)
        return batches, batches / work.batches, 0.0
    windows = work.batches * work.batch_windows
    each = math.ceil(work.step_windows / num_devices)  # the step grows to whole windows on every device
    steps = windows / (each * num_devices)
    return steps * math.ceil(each / work.batch_windows), 1 / num_devices, steps


def _reduced(num_bytes: float, num_devices: int) -> float:
    """Bytes each device sends in a ring all-reduce."""
    return 2 * num_bytes * (num_devices - 1) / num_devices


def _reduce_seconds(num_bytes: float, device: Device, num_devices: int) -> float:
    """A ring inside each machine, then rings over the machines, one for each device of a machine."""
    inside = min(num_devices, DEVICES_PER_MACHINE)
    machines = math.ceil(num_devices / DEVICES_PER_MACHINE)
    seconds = _reduced(num_bytes, inside) / device.interconnect
    return seconds + _reduced(num_bytes / inside, machines) / device.network


def _link(device: Device, num_devices: int) -> float:
    return device.interconnect if num_devices <= DEVICES_PER_MACHINE else min(device.interconnect, device.network)
