"""Modelling code inside a checkpoint, only for a replacement that no stock layer of the model can express."""

from pathlib import Path

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from llm_streamline.arch import find_arch
from llm_streamline.layer_config import CODE_KEY, MAP_KEY, text_config
from llm_streamline.replacements import mlp_layer
from llm_streamline.structure import find_layers_path

MODULE_NAME = "modeling_streamline"
CLASS_NAME = "StreamlineForCausalLM"

_CLASS = '''

class {name}({base}):
    """{base} with an MLP in place of some decoder layers, or a map behind some.

    Which ones, `config.{key}` and `config.{map_key}` say.
    """

    def __init__(self, config):
        super().__init__(config)
        layers = self.get_submodule("{layers}")
        text = config.get_text_config(decoder=True)
        for index, settings in (getattr(text, "{key}", None) or {{}}).items():
            layers[int(index)] = build_mlp_layer(settings, layers[int(index)], text.hidden_size)
        for index, kind in (getattr(text, "{map_key}", None) or {{}}).items():
            add_stream_map(layers[int(index)], StreamMap(kind, text.hidden_size))
        self.post_init()
'''


def needs_code(model: nn.Module) -> bool:
    """Whether the edited `model` holds a layer that stock transformers would not build."""
    return _has_code(model.config)


def _has_code(config: PreTrainedConfig) -> bool:
    return any(getattr(text_config(config), key, None) for key in (CODE_KEY, MAP_KEY))


def loading_class(config: PreTrainedConfig) -> type:
    """The class whose `from_pretrained` reads a checkpoint of this config.

    A checkpoint of ours with MLP layers or maps is read with the code of this package, never with the file in its
    folder: nothing that was downloaded is run.
    """
    if not _has_code(config):
        return AutoModelForCausalLM
    base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class StreamlineForCausalLM(base):
        def __init__(self, config: PreTrainedConfig):
            super().__init__(config)
            text = text_config(config)
            layers = self.get_submodule(find_layers_path(self, text))
            for index, settings in (getattr(text, CODE_KEY, None) or {}).items():  # a later cut may leave none
                layers[int(index)] = mlp_layer.build_mlp_layer(settings, layers[int(index)], text.hidden_size)
            for index, kind in (getattr(text, MAP_KEY, None) or {}).items():
                mlp_layer.add_stream_map(layers[int(index)], mlp_layer.StreamMap(kind, text.hidden_size))
            self.post_init()

    return StreamlineForCausalLM


def shipped_files(model: nn.Module) -> dict[str, str]:
    """Name -> text of the files to put beside the weights; also points the model's config at them.

    Returns:
        Nothing for a model of stock layers.
    """
    if not needs_code(model):
        return {}
    base = next(c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    model.config.auto_map = {"AutoModelForCausalLM": f"{MODULE_NAME}.{CLASS_NAME}"}
    source = Path(mlp_layer.__file__).read_text(encoding="utf-8")
    head, _, rest = source.partition("from transformers.activations import ACT2FN\n")
    imports = f"from transformers import {base}\nfrom transformers.activations import ACT2FN\n"
    body = _CLASS.format(name=CLASS_NAME, base=base, key=CODE_KEY, map_key=MAP_KEY, layers=find_arch(model).layers)
    return {f"{MODULE_NAME}.py": head + imports + rest + body}
