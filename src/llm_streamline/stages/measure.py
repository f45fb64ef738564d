"""The stage that measures: one pass over the calibration windows, and how long a layer takes here."""

import time

import torch

from llm_streamline.arch import get_layers
from llm_streamline.config import Recipe
from llm_streamline.data.windows import Windows
from llm_streamline.measure.files import Statistics, StatsInfo
from llm_streamline.measure.partial import run_tapped
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe
from llm_streamline.runtime import peak_memory, reset_peak_memory, versions
from llm_streamline.sources import LoadedModel
from llm_streamline.stages.original import model_facts


def measure(loaded: LoadedModel, calibration: Windows, recipe: Recipe) -> Statistics:
    """One pass over the calibration windows.

    Raises:
        NumericsError: if a layer's output is not finite; the message names the layer.
    """
    facts = model_facts(loaded)
    sums = CosineStats(facts.num_layers)
    reset_peak_memory()
    seconds = observe(loaded.model, calibration, sums, recipe.calibration.batch_tokens, "measuring similarities")
    sums.require_data()
    info = StatsInfo(
        model=facts,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        num_tokens=sums.num_tokens,
        count_first=sums.count_first,
        count_rest=sums.count_rest,
        num_windows=len(calibration),
        seq_len=calibration.seq_len,
        batch_tokens=recipe.calibration.batch_tokens,
        seconds=round(seconds, 3),
        layer_seconds_per_token=seconds / (sums.num_tokens * facts.num_layers),
        peak_memory_bytes=max(peak_memory().host_bytes, peak_memory().device_bytes),
        machine=versions(),
        text=dict(calibration.provenance),
    )
    return Statistics(sums, info)


@torch.inference_mode()
def time_layers(loaded: LoadedModel, recipe: Recipe) -> float:
    """Seconds that one layer's forward takes for one token here: the faster of two passes over one window."""
    length = min(recipe.text.seq_len, 512)
    ids = torch.zeros(1, length, dtype=torch.long, device=loaded.device)
    num_layers, times = min(len(get_layers(loaded.model)), 4), []  # enough to tell, on a model of any depth
    for _ in range(2):
        started = time.perf_counter()
        states, _ = run_tapped(loaded.model, {"input_ids": ids}, stop=num_layers)
        float(states[num_layers].flatten()[0])  # waits for an accelerator
        times.append(time.perf_counter() - started)
    return min(times) / (length * num_layers)
