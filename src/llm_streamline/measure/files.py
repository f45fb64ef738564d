"""Statistics on disk: stats.safetensors holds the sums, stats.json what they are of, written last."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from llm_streamline.errors import ConfigError
from llm_streamline.measure.scores import massive_activation_layers, mean_similarity
from llm_streamline.measure.stats import CosineStats
from llm_streamline.output import write_bytes, write_json
from llm_streamline.plan import ModelFacts
from llm_streamline.schema import FrozenModel, parse

STATS_VERSION = 1


class StatsInfo(FrozenModel):
    """What the sums are of, and how long the pass took."""

    version: int = STATS_VERSION
    model: ModelFacts
    dtype: str
    device: str
    num_tokens: int
    count_first: int = Field(description="first tokens of windows")
    count_rest: int
    num_windows: int
    seq_len: int
    batch_tokens: int
    seconds: float = Field(description="wall time of the pass")
    layer_seconds_per_token: float = Field(description="the pass's time by tokens and layers: to estimate with")
    peak_memory_bytes: int
    machine: dict[str, str] = Field(description="versions and processor")
    text: dict[str, Any] = Field(description="provenance of the windows")


@dataclass(frozen=True)
class Statistics:
    """One pass's sums with their history."""

    sums: CosineStats
    info: StatsInfo

    @property
    def similarity(self) -> torch.Tensor:
        """(L+1, L+1) mean cosine over all calibration tokens."""
        return mean_similarity(self.sums.cosine_sum_first + self.sums.cosine_sum_rest, self.sums.num_tokens)

    @property
    def similarity_first(self) -> torch.Tensor:
        """(L+1, L+1) mean cosine over first tokens."""
        return mean_similarity(self.sums.cosine_sum_first, self.sums.count_first)

    @property
    def similarity_rest(self) -> torch.Tensor:
        """(L+1, L+1) mean cosine over all other tokens; over all tokens where windows are one token long."""
        if self.sums.count_rest == 0:
            return self.similarity
        return mean_similarity(self.sums.cosine_sum_rest, self.sums.count_rest)

    @property
    def massive_layers(self) -> list[int]:
        """Layers that make a massive activation at the first token."""
        sums = self.sums
        return massive_activation_layers(
            sums.norm_sum_first / max(sums.count_first, 1), sums.norm_sum_rest / max(sums.count_rest, 1)
        )

    def save(self, folder: Path) -> None:
        """Write stats.safetensors, then stats.json."""
        write_bytes(folder / "stats.safetensors", save(self.sums.tensors()))
        write_json(folder / "stats.json", self.info.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> "Statistics":
        """Read what `save` wrote; `folder` may also be the run's folder above it.

        Raises:
            ConfigError: if the files are missing or damaged.
        """
        folder = Path(folder)
        if not (folder / "stats.json").is_file() and (folder / "streamline" / "stats.json").is_file():
            folder = folder / "streamline"
        try:
            info = parse(StatsInfo, json.loads((folder / "stats.json").read_text(encoding="utf-8")), str(folder))
            tensors = load_file(folder / "stats.safetensors")
        except FileNotFoundError:
            raise ConfigError(
                f"no statistics in {folder}; `llm-streamline analyze MODEL -o {folder}` makes them"
            ) from None
        except (OSError, ValueError, SafetensorError) as problem:
            raise ConfigError(f"the statistics in {folder} are damaged: {problem}; run analyze again") from None
        sums = CosineStats(info.model.num_layers)
        for name, empty in sums.tensors().items():
            if name not in tensors or tensors[name].shape != empty.shape:
                raise ConfigError(
                    f"{folder / 'stats.safetensors'} has no '{name}' of the right shape; run analyze again"
                )
            setattr(sums, name, tensors[name])
        sums.count_first, sums.count_rest = info.count_first, info.count_rest
        return cls(sums, info)
