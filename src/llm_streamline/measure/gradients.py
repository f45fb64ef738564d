"""Scores of layers that need their weights, or a backward: one number a layer, nothing of a gradient is kept.

Shapes: L layers, W windows, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llm_streamline.arch import get_layers
from llm_streamline.data.windows import Windows
from llm_streamline.errors import ArchitectureError, NumericsError
from llm_streamline.logs import progress_bar
from llm_streamline.measure.losses import cross_entropy, mean_loss
from llm_streamline.measure.stream import WAY_OUT, batches
from llm_streamline.memory_limits import Portions


def layer_weights(layer: nn.Module) -> list[nn.Parameter]:
    """Weights of a layer's projections, experts and norms; biases are left out.

    Raises:
        ArchitectureError: if the layer is offloaded or quantised, so that its weights are not there to be read.
    """
    weights = [p for name, p in layer.named_parameters() if not name.endswith("bias")]
    if any(weight.is_meta or not weight.is_floating_point() for weight in weights):
        kind = "offloaded" if any(weight.is_meta for weight in weights) else "quantised"
        raise ArchitectureError(
            f"scores of weights need them in memory as plain numbers, but this model is {kind}; choose by another score"
        )
    return weights


@torch.no_grad()
def magnitudes(model: nn.Module, power: int) -> Tensor:
    """Sum of |w|^power over each layer's weights, no root taken: (L,) float64."""
    norms = [[_power_sum(weight, power) for weight in layer_weights(layer)] for layer in get_layers(model)]
    return torch.stack([torch.stack(found).sum() for found in norms]).cpu()


def taylor(model: nn.Module, windows: Windows) -> Tensor:
    """First-order estimate of what a layer's weights are worth: sum over them of |w * dL/dw|, window by window.

    L is the mean next-token loss of one window. So a gradient is summed over the positions of a window, the absolute
    value is taken for each weight and window, and only then is anything summed further. (With signed sums over more
    windows, as in the authors' code with several batches, the scores would depend on how many there are.) Windows run
    one at a time, whatever the batch size. A layer's gradients are reduced to one number as soon as each is there, so
    that only one weight's gradient exists at a time.

    Args:
        model: left as it was: gradients, flags and hooks included.
        windows: calibration text.

    Returns:
        (W, L) float64; the mean over windows is the score. Low means little is lost: prune low first.

    Raises:
        ArchitectureError: if the model is offloaded.
        NumericsError: if a score is not finite; the message names the layer.
        OutOfMemoryError: if a window does not fit.
    """
    layers = get_layers(model)
    device = model.get_input_embeddings().weight.device
    scores: list[Tensor] = []
    portions = Portions("taking gradients", WAY_OUT)  # of one window: what does not fit is told in a sentence

    def score(ids: Tensor) -> Tensor:
        sums.zero_()
        logits = model(input_ids=ids, use_cache=False).logits
        mean_loss(cross_entropy, logits[:, :-1], ids[:, 1:]).backward()
        _check_finite(sums)
        return sums.clone()

    with progress_bar("gradients", len(windows)) as bar, _reduced_gradients(layers) as sums, torch.enable_grad():
        for _, ids in batches(windows, 1, device):
            scores += portions.run(ids, score)
            bar.advance()
    return torch.stack(scores)


@contextmanager
def _reduced_gradients(layers: Sequence[nn.Module]) -> Iterator[Tensor]:
    """While open, a backward adds |w * dL/dw|, summed over each layer's weights, to the yielded (L,) float64 tensor."""
    sums = torch.zeros(len(layers), dtype=torch.float64)
    weights = [(index, weight) for index, layer in enumerate(layers) for weight in layer_weights(layer)]
    flags = [weight.requires_grad for _, weight in weights]
    before = [weight.grad for _, weight in weights]
    handles = []

    def reduce_into(index: int):
        def reduce(weight: nn.Parameter) -> None:
            sums[index] += _power_sum(_wide(weight.detach()) * _wide(weight.grad), 1).cpu()
            weight.grad = None

        return reduce

    try:
        for index, weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(reduce_into(index)))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for (_, weight), flag, gradient in zip(weights, flags, before, strict=True):
            weight.requires_grad_(flag)
            weight.grad = gradient


def _power_sum(values: Tensor, power: int) -> Tensor:
    """Sum of |x|^power in float64, without a float64 copy."""
    return torch.linalg.vector_norm(values, power, dtype=torch.float64) ** power


def _wide(values: Tensor) -> Tensor:
    """At least float32: a product of two small half-precision numbers is zero."""
    return values.float() if values.element_size() < 4 else values


def _check_finite(sums: Tensor) -> None:
    if not bool(sums.isfinite().all()):
        layer = int((~sums.isfinite()).nonzero()[0])
        raise NumericsError(
            f"the gradient of layer {layer} is not finite on the calibration text; try --dtype bfloat16 or float32"
        )
