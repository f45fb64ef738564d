"""The truth that a checkpoint cut on files must equal: the original, its layers on disk, the removed ones left out.

A layer's weights are read when its forward begins and dropped when it ends, so that memory holds the embeddings, the
head and one layer. Nothing of this is shared with `stream.py`: neither the renaming of tensors nor the edited files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llm_streamline.files import temporary_folder
from llm_streamline.sources import ModelSource, load_model
from llm_streamline.surgery import shared_view

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llm_streamline.plan import Plan


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
    name = str(dtype).removeprefix("torch.")
    with temporary_folder(scratch) as converted:
        original = load_model(source, name, "cpu", with_tokenizer=False, layers_on_disk=True, scratch=converted).model
        yield shared_view(original, plan.layer_sources())
