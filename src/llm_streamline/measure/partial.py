"""Partial forwards: read the states between layers, stop early, resume half-way.

Everything runs *inside* the model's own forward, by hooks, so that each layer gets the masks, positions and rotary
tables that the model itself would give it: a layer called by hand would silently lose them.

Shapes: B windows, T tokens, d width, L layers. Boundary b in 0..L is the state (B, T, d) entering layer b; boundary L
is what leaves the last layer, before the final norm (`output_hidden_states` would give it after the norm).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_streamline.arch import get_layers
from llm_streamline.surgery import shared_view


class _Reached(Exception):
    """The last wanted boundary was reached; what lies above it need not run."""


def state_of(output: Any) -> Tensor:
    """The hidden state in a layer's output, which is a tensor or, in some families, a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def tapped(layers: Sequence[nn.Module], boundaries: Iterable[int], stop: int | None) -> Iterator[dict[int, Tensor]]:
    """While open, a forward of the model fills the yielded dictionary: boundary -> state (B, T, d).

    Args:
        layers: the model's decoder layers.
        boundaries: which states to keep.
        stop: boundary after which the forward is abandoned; None runs to the logits.
    """
    states: dict[int, Tensor] = {}
    handles = []
    wanted = set(boundaries) | ({stop} if stop is not None else set())

    def keep(boundary: int, state: Tensor) -> None:
        states[boundary] = state
        if boundary == stop:
            raise _Reached

    def before_first(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(boundary: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: keep(boundary, state_of(output))

    try:
        if 0 in wanted:
            handles.append(layers[0].register_forward_pre_hook(before_first, with_kwargs=True))
        for boundary in sorted(wanted - {0}):
            handles.append(layers[boundary - 1].register_forward_hook(after(boundary)))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def run_tapped(
    model: nn.Module, inputs: dict[str, Tensor], boundaries: Iterable[int] = (), stop: int | None = None
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Run `model` on a batch and keep the states at some boundaries.

    Args:
        model: a causal language model.
        inputs: keyword arguments of its forward: input_ids (B, T) and, for padded batches, attention_mask (B, T).
        boundaries: which states to keep.
        stop: boundary to stop at; None computes the logits.

    Returns:
        The states, and the logits (B, T, V) or None when the forward stopped early.
    """
    with tapped(get_layers(model), boundaries, stop) as states:
        try:
            return states, model(**inputs, use_cache=False).logits
        except _Reached:
            return states, None


class _Skipped(nn.Module):
    """Stands where a layer of the shared prefix was: costs nothing, passes on the state it was given."""

    def __init__(self, layer: nn.Module, returns_tuple: bool):
        super().__init__()
        self._original = (layer,)  # in a tuple: not a sub-module, so not moved, saved or counted
        self._returns_tuple = returns_tuple
        self.state: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)  # some models read a layer's `attention_type`

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = hidden_states if self.state is None else self.state
        return (state, None) if self._returns_tuple else state


class ResumedModel:
    """An edited model that starts at a boundary, from a state that the original model has already computed.

    Teacher and student share every layer below the first edit; so do the candidates of a search. That prefix is run
    once, and each of them goes on from its boundary. Modules are shared with the original, which stays untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Sequence[int],
        at: int,
        patches: dict[int, nn.Module] | None = None,
        outside: dict[str, nn.Module] | None = None,
        *,
        prefix: Sequence[int] | None = None,
    ):
        """Make the view.

        Args:
            model: the original.
            sources: original index of each layer of the edited model.
            at: boundary to resume from; the layers below it must be those of the model that makes the state.
            patches: position in the edited model -> module that stands there instead of the shared one; below `at` they
                are part of what made the state, and not run again.
            outside: path -> module that stands there instead of the shared one, elsewhere than in the layers.
            prefix: original index of each layer of the model that makes the state; None: the original makes it.
        """
        prefix = list(range(at)) if prefix is None else list(prefix[:at])
        if list(sources[:at]) != prefix:
            raise AssertionError(f"the edited model does not start with the layers {prefix}: {sources}")
        layers = get_layers(model)
        returns_tuple = at > 0 and layers_return_tuples(model)
        self._skipped = [_Skipped(layers[source], returns_tuple) for source in sources[:at]]
        self.at = at
        self.num_layers = len(sources)
        self.view = shared_view(model, sources, {**(patches or {}), **dict(enumerate(self._skipped))}, outside)

    def run(
        self,
        inputs: dict[str, Tensor],
        state: Tensor | None,
        stop: int | None = None,
        boundaries: Iterable[int] = (),
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Go on from `state`.

        Args:
            inputs: the same batch that gave `state`.
            state: (B, T, d) at boundary `at`; ignored when `at` is 0.
            stop: boundary of the edited model to stop at; None computes the logits.
            boundaries: boundaries of the edited model whose states to keep; the one at `stop` is always kept.

        Returns:
            The states, and the logits (B, T, V) or None when the forward stopped early.
        """
        if self._skipped:
            self._skipped[-1].state = state
        try:
            return run_tapped(self.view, inputs, boundaries, stop)
        finally:
            if self._skipped:
                self._skipped[-1].state = None


def layers_return_tuples(model: nn.Module) -> bool:
    """Whether the model's layers return tuples or plain tensors, seen on a forward of two tokens through one layer."""
    seen: list[bool] = []
    first = get_layers(model)[0]
    handle = first.register_forward_hook(lambda _module, _args, output: seen.append(isinstance(output, tuple)))
    try:
        device = model.get_input_embeddings().weight.device
        with torch.no_grad():
            run_tapped(model, {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}, stop=1)
    finally:
        handle.remove()
    return seen[0]
