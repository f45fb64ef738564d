"""The truth that a checkpoint cut on files must equal: the original, its layers on disk, the removed ones left out.

A layer's weights are read when its forward begins and dropped when it ends, so that memory holds the embeddings, the
head and one layer. Nothing of this is shared with `stream.py`: neither the renaming of tensors nor the edited files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.arch import find_arch
from llm_streamline.config_checks import check_loading, one_line
from llm_streamline.errors import SourceError
from llm_streamline.files import temporary_folder
from llm_streamline.quiet import quiet_transformers
from llm_streamline.sources import ModelSource, load_config, load_skeleton, model_folder
from llm_streamline.surgery import shared_view

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from llm_streamline.plan import Plan


def layers_on_disk(model: "nn.Module", layers: str, num_layers: int) -> dict[str, str]:
    """A device map that leaves the weights of every decoder layer on disk and puts all else on the CPU.

    Args:
        model: any model of the class that will be loaded; no weights are looked at.
        layers: path of the list of layers.
        num_layers: how many there will be.
    """
    places = {f"{layers}.{index}": "disk" for index in range(num_layers)}
    path = ""
    for name in layers.split("."):
        for child, _ in model.get_submodule(path).named_children():
            if child != name:
                places[f"{path}.{child}".lstrip(".")] = "cpu"
        path = f"{path}.{name}".lstrip(".")
    return places


@contextmanager
def cut_original(source: ModelSource, plan: "Plan", dtype: "torch.dtype", scratch: Path) -> Iterator["PreTrainedModel"]:
    """Yield the model that a plan leaves, with its layers on disk, for forwards without cache.

    Args:
        source: from `resolve_model`.
        plan: with edits of kind remove only.
        dtype: of the weights.
        scratch: a folder with room for weights that transformers must rearrange (mixtures of experts); left as it was.

    Raises:
        SourceError: the weights do not fit the configuration, or cannot be read.
        ArchitectureError: the edit is not sound.
    """
    from llm_streamline.replacements.ship import loading_class

    skeleton = load_skeleton(source)
    arch = find_arch(skeleton)
    places = layers_on_disk(skeleton, arch.layers, arch.num_layers)
    del skeleton
    with temporary_folder(scratch) as offloaded:
        try:
            with quiet_transformers():
                model, info = loading_class(load_config(source)).from_pretrained(
                    model_folder(source),
                    dtype=dtype,
                    device_map=places,
                    offload_folder=offloaded,
                    output_loading_info=True,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
        except Exception as error:  # a foreign parser on foreign data: whatever it raises, the files cannot be read
            raise SourceError(f"cannot load {source.spec}: {one_line(error)}") from error
        check_loading(info, source.spec)
        yield shared_view(model.requires_grad_(False).eval(), plan.layer_sources())
