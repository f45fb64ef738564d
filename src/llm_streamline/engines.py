"""What a model is run with, where there is a choice: the attention's kernel, compiled networks, packed weights.

All of it is checked before any weight is read. Whatever is chosen here changes how fast the original runs and how much
memory it takes; the result is always cut from the original's own weights.
"""

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import ConfigError, MissingExtraError
from llm_streamline.runtime import pick_device

if TYPE_CHECKING:
    from llm_streamline.config import Recipe

FLASH = "flash_attention_2"


def check_engines(recipe: "Recipe") -> None:
    """Refuse what this machine cannot do.

    Raises:
        ConfigError: if the device or the dtype does not go with it.
        MissingExtraError: if a package is not installed.
    """
    device = pick_device(recipe.device).type
    if recipe.attn_implementation == FLASH:
        if device != "cuda":
            raise ConfigError(f"attn_implementation {FLASH} needs a CUDA device, this run is on {device}; use sdpa")
        if recipe.dtype == "float32":
            raise ConfigError(f"attn_implementation {FLASH} has no float32; use dtype bfloat16, or sdpa")
        if find_spec("flash_attn") is None:
            raise MissingExtraError(
                f"attn_implementation {FLASH} needs flash-attn: pip install flash-attn; or use sdpa"
            )
    if recipe.training.torch_compile and device == "cpu" and not _cpp_compiler():
        raise ConfigError("training.torch_compile on the CPU needs a C++ compiler (g++); install one, or leave it off")
    if recipe.quantization != "none":
        if find_spec("bitsandbytes") is None:
            raise MissingExtraError(
                f'quantization {recipe.quantization} needs bitsandbytes: pip install "llm-streamline[quantization]"'
            )
        if device == "mps":
            raise ConfigError("quantization does not run on mps; use cpu or cuda, or quantization none")
        if recipe.training.heals:
            raise ConfigError(
                f"training.trainable {recipe.training.trainable} trains the original's own weights, which are packed "
                "with quantization; use trainable replacement, or quantization none"
            )


def _cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))


def loading_options(attention: str, quantization: str, dtype: Any) -> dict[str, Any]:
    """What `from_pretrained` is told beside the dtype."""
    options: dict[str, Any] = {}
    if attention != "auto":
        options["attn_implementation"] = attention
    if quantization != "none":
        from transformers import BitsAndBytesConfig

        if quantization == "4bit":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        else:
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return options
