"""Modelling code inside a checkpoint, only for a replacement that no stock layer of the model can express."""

from pathlib import Path

from torch import nn

from llm_streamline.arch import find_arch
from llm_streamline.layer_config import text_config
from llm_streamline.replacements import mlp_layer
from llm_streamline.replacements.mlp import CODE_KEY

MODULE_NAME = "modeling_streamline"
CLASS_NAME = "StreamlineForCausalLM"

_CLASS = '''

class {name}({base}):
    """{base} with an MLP in place of some decoder layers; which ones, `config.{key}` says."""

    def __init__(self, config):
        super().__init__(config)
        layers = self.get_submodule("{layers}")
        for index, settings in config.{key}.items():
            layers[int(index)] = build_mlp_layer(settings, layers[int(index)], config.hidden_size)
        self.post_init()
'''


def needs_code(model: nn.Module) -> bool:
    """Whether the edited `model` holds a layer that stock transformers would not build."""
    return bool(getattr(text_config(model.config), CODE_KEY, None))


def shipped_files(model: nn.Module) -> dict[str, str]:
    """Name -> text of the files to put beside the weights; also points the model's config at them.

    Returns:
        Nothing for a model of stock layers.
    """
    if not needs_code(model):
        return {}
    base = type(model).__name__
    model.config.auto_map = {"AutoModelForCausalLM": f"{MODULE_NAME}.{CLASS_NAME}"}
    source = Path(mlp_layer.__file__).read_text(encoding="utf-8")
    head, _, rest = source.partition("from transformers.activations import ACT2FN\n")
    imports = f"from transformers import {base}\nfrom transformers.activations import ACT2FN\n"
    body = _CLASS.format(name=CLASS_NAME, base=base, key=CODE_KEY, layers=find_arch(model).layers)
    return {f"{MODULE_NAME}.py": head + imports + rest + body}
