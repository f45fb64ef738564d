"""How much the attention and the MLP of every layer turn the state, both in one streamed pass.

Shapes: L layers, B windows, T tokens, d width, W windows in all. The state between the two sublayers is what goes into
the MLP's norm, or into the MLP where no norm stands before it; at most two states of one layer are held at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_streamline.arch import find_arch, get_layers
from llm_streamline.errors import ArchitectureError, NoDataError, NumericsError
from llm_streamline.measure.partial import state_of

PARTS = ("attention", "mlp")


class SublayerStats:
    """Mean over a window's tokens of one minus the cosine between what enters and what leaves a sublayer.

    "Leaves" means with the residual: the attention of layer l takes h to h + attention(norm(h)).
    """

    def __init__(self, model: nn.Module):
        """Find where the sublayers meet.

        Raises:
            ArchitectureError: if there is no state between attention and MLP; the message says why.
        """
        arch = find_arch(model)
        self._layers = get_layers(model)
        if arch.parallel:
            raise ArchitectureError(
                f"attention and MLP of this {arch.model_type} read the same state, so there is none between them to "
                "compare; use score: loss"
            )
        self._between = arch.mlp_norm_in or arch.family.mlp
        if not self._between:
            raise ArchitectureError(f"layers of {arch.model_type} are one sublayer, not attention and MLP")
        self._rows: list[Tensor] = []  # (B, L, 2) float64
        self._now: dict[tuple[int, int], Tensor] = {}  # (layer, part) -> (B,)

    @property
    def boundaries(self) -> range:
        """The pass runs to the last layer's output; the states in between come by hooks."""
        return range(len(self._layers), len(self._layers) + 1)

    @property
    def change(self) -> Tensor:
        """(W, L, 2) float64 in [0, 2], attention first; low: the sublayer changes little.

        Raises:
            NoDataError: if no window was seen.
        """
        if not self._rows:
            raise NoDataError("no calibration token reached the layers; is the text empty?")
        return torch.cat(self._rows)

    def update(self, states: list[Tensor], mask: Tensor | None, first_window: int) -> None:
        """Keep what the hooks have seen of this batch of unpadded windows.

        Raises:
            NumericsError: if a state is not finite; the message names the layer.
        """
        assert mask is None, "windows are packed, without padding"
        found = torch.stack([torch.stack([self._now.pop((i, p)) for p in (0, 1)], 1) for i in self._indices], 1)
        good = found.isfinite().all(dim=2).all(dim=0)
        if not bool(good.all()):
            raise NumericsError(f"a state in layer {int((~good).nonzero()[0])} is not finite on the calibration text")
        self._rows.append(found)

    @property
    def _indices(self) -> range:
        return range(len(self._layers))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place while open."""
        held: dict[int, Tensor] = {}
        handles = []

        def entered(index: int):
            def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                held[index] = args[0] if args else kwargs["hidden_states"]

            return keep

        def between(index: int):
            def compare(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                state = (args[0] if args else kwargs["hidden_states"]).reshape(held[index].shape)
                self._now[index, 0] = _turn(held[index], state)
                held[index] = state

            return compare

        def left(index: int):
            def compare(_module: nn.Module, _args: tuple, output: Any) -> None:
                self._now[index, 1] = _turn(held.pop(index), state_of(output))

            return compare

        try:
            for index, layer in enumerate(self._layers):
                handles.append(layer.register_forward_pre_hook(entered(index), with_kwargs=True))
                inner = layer.get_submodule(self._between)
                handles.append(inner.register_forward_pre_hook(between(index), with_kwargs=True))
                handles.append(layer.register_forward_hook(left(index)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _turn(before: Tensor, after: Tensor) -> Tensor:
    """One minus the cosine, mean over tokens: two (B, T, d) -> (B,) float64 on the CPU."""
    return 1 - F.cosine_similarity(before.float(), after.float(), dim=-1).double().mean(dim=1).cpu()
