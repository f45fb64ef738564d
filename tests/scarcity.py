"""A model that finds no memory."""

from contextlib import contextmanager

import torch

from llm_streamline.arch import get_layers


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@contextmanager
def room_for(model, most, layer=1, after=0):
    """From its call number `after` on, a layer finds no memory for more than `most` windows; yields what it was given.

    Other layers have run by then: what they left must not count twice.
    """
    given = []

    def check(_module, args, kwargs):
        given.append(len(args[0] if args else kwargs["hidden_states"]))
        if len(given) > after and given[-1] > most:
            raise no_memory()

    handle = get_layers(model)[layer].register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()
