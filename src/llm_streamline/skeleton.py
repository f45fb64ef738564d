"""A model without weights: its modules and the shapes of its tensors, on the meta device, which takes no memory."""

from typing import TYPE_CHECKING

from llm_streamline.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_skeleton(
    config: "PretrainedConfig", model_class: type | None = None, *, own_code: bool = False
) -> "PreTrainedModel":
    """Build what a configuration describes; whatever transformers raises on one that describes no model is let through.

    Args:
        config: of a causal language model.
        model_class: transformers' auto class, which is taken when None, or a class of models.
        own_code: run the modelling code in the checkpoint's folder: for a checkpoint that this process has written.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = model_class or AutoModelForCausalLM
    with torch.device("meta"), quiet_transformers():
        if hasattr(kind, "_from_config"):  # the auto class has the method without underscore
            return kind._from_config(config)
        return kind.from_config(config, trust_remote_code=own_code)
