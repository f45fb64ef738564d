"""torch.compile for the networks that are trained, and for them alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from llm_streamline.replacements.base import Replacement


@contextmanager
def compiled(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Run the networks compiled while the block lasts; their parameters and names stay as they are.

    The original stays as it is: hooks that come and go read its states, and each would be compiled anew. For the same
    reason `forward` is compiled and not the module, whose call runs the hooks.
    """
    modules = [module for replacement in replacements for module in replacement.patches().values()]
    for module in modules:
        module.forward = torch.compile(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own is found again
