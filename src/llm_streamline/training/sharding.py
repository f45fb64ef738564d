"""A teacher split over the ranks: each holds a part of every decoder layer, and gathers a layer when it is run.

For originals that leave no room beside them on one accelerator. The engine is FSDP2 (`fully_shard`). What is trained
stays whole on every rank, because it is small; so are embedding, final norm and head, which may be tied.
"""

import torch
from torch import nn

from llm_streamline import ranks
from llm_streamline.arch import get_layers
from llm_streamline.config import TrainingConfig
from llm_streamline.logs import get_logger

log = get_logger()


def shard_teacher(model: nn.Module, training: TrainingConfig) -> bool:
    """Split the decoder layers over the ranks, in place, when the launcher's config asks for it; whether it was done.

    Not done where the original's own weights are trained: those are shared with it and must stay whole.
    """
    if not ranks.wants_sharding():
        return False
    if training.heals:
        log.warning(
            "training.trainable: %s shares its weights with the original, which stays whole on every process",
            training.trainable,
        )
        return False
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = model.get_input_embeddings().weight.device
    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    for layer in get_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    log.info("the original is split over %d processes while the network is trained", ranks.world_size())
    return True


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the model's weights lie on other ranks."""
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
