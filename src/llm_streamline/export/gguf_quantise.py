"""K-quants through llama.cpp's own quantiser, where a Python binding to it is installed.

The gguf package knows how to read them but not how to make them. Two bindings are known; the first found is used.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from llm_streamline.errors import MissingExtraError, OutputError

# llama.cpp's names of file types that mix several block types -> its numbers of them.
MIXED_TYPES = {
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}


def quantise_file(source: Path, out_file: Path, dtype: str) -> None:
    """Write `source`, a GGUF file in 16 or 32 bits, again in a smaller type.

    Args:
        source: the file to read.
        out_file: the file to write; replaced if it is there.
        dtype: a key of `MIXED_TYPES`.

    Raises:
        MissingExtraError: no llama.cpp binding is installed.
        OutputError: llama.cpp did not manage.
    """
    for module, quantise in _BINDINGS.items():
        if importlib.util.find_spec(module) is not None:
            quantise(source, out_file, MIXED_TYPES[dtype])
            return
    raise MissingExtraError(
        f'{dtype} is made by llama.cpp itself: pip install "llm-streamline[gguf]" brings its binding cyllama '
        "(llama-cpp-python will do as well), or export F16 and run llama-quantize on it; Q8_0, Q5_1, Q5_0, Q4_1 and "
        "Q4_0 need neither"
    )


def _with_cyllama(source: Path, out_file: Path, number: int) -> None:
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype = number
    try:
        llama_cpp.model_quantize(str(source), str(out_file), params)
    except RuntimeError as error:
        raise OutputError(f"llama.cpp could not quantise {source}: {error}") from error


def _with_llama_cpp_python(source: Path, out_file: Path, number: int) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out_file).encode(), params)
    if code != 0:
        raise OutputError(f"llama.cpp could not quantise {source}: code {code}")


_BINDINGS: dict[str, Callable[[Path, Path, int], None]] = {
    "llama_cpp": _with_llama_cpp_python,
    "cyllama": _with_cyllama,
}
