"""Finding a model: names and headers are looked at, no weights are read, and what cannot be used is refused early."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_streamline.errors import SourceError
from llm_streamline.sources.carried import CARRIED, carried_file
from llm_streamline.sources.checks import check_config, read_config
from llm_streamline.sources.gguf import read_gguf_header
from llm_streamline.sources.weights import PICKLE_SUFFIXES, read_weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_SAMPLE_BYTES = 64 * 1024
_VOLATILE_KEYS = ("_name_or_path", "transformers_version")  # change when the same model is saved again


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and whose files look sound."""

    spec: str  # as the user wrote it
    kind: Literal["folder", "hub", "gguf", "demo"]
    path: Path  # the folder, or the GGUF file
    revision: str | None  # commit of a Hub model
    fingerprint: str  # sha256 in hexadecimal of config and weights (sampled), the same wherever the model lies


def resolve_model(spec: str | Path, revision: str | None = None) -> ModelSource:
    """Find a model and check everything that can be checked without reading its weights.

    Args:
        spec: `demo`, `gemma`, a path to a folder or a `.gguf` file, or a Hub id such as `Qwen/Qwen3-0.6B`.
        revision: branch, tag or commit; for Hub ids only.

    Raises:
        SourceError: not there, corrupt, pickled, quantised, or not a decoder-only causal language model.
        MissingExtraError: the carried model's or GGUF's package is not installed.
    """
    spec = str(spec)
    if revision is not None and (spec in CARRIED or os.path.exists(spec)):
        raise SourceError(f"revision {revision!r} was given, but {spec} is not a Hub id, so it has no revisions")
    if spec in CARRIED:
        return _gguf_source(spec, "demo" if spec == "demo" else "gguf", carried_file(spec))
    try:
        path = Path(spec).expanduser()
        is_folder, is_file = path.is_dir() and spec != "", path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null character, ~ of nobody
        raise SourceError(f"{spec[:80]!r} is not a usable path or Hub id: {error}") from error
    if is_folder:
        return _folder_source(spec, "folder", path, None)
    if is_file:
        if path.suffix.lower() == ".gguf":
            return _gguf_source(spec, "gguf", path)
        raise SourceError(_why_not_that_file(path))
    is_path = spec.startswith((".", "/", "~")) or "\\" in spec or spec.count("/") > 1
    if is_path or path.suffix.lower() in (".gguf", ".safetensors", *PICKLE_SUFFIXES) or not _HUB_ID.fullmatch(spec):
        raise SourceError(f"no model at {spec}: give a Hugging Face folder, a .gguf file, a Hub id, `demo` or `gemma`")
    return _hub_source(spec, revision)


# --- kinds of source


def _gguf_source(spec: str, kind: Literal["gguf", "demo"], path: Path) -> ModelSource:
    read_gguf_header(path)
    return ModelSource(spec, kind, path, None, _fingerprint({}, (path,)))


def _folder_source(spec: str, kind: Literal["folder", "hub"], folder: Path, revision: str | None) -> ModelSource:
    raw = check_config(folder, spec)
    weights = read_weights(folder)
    num_layers = getattr(read_config(folder, spec).get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(num_layers, int) and not 1 <= num_layers <= weights.num_layers:
        raise SourceError(
            f"config.json of {spec} says {num_layers} layers, its weights hold {weights.num_layers}; download it again"
        )
    return ModelSource(spec, kind, folder, revision, _fingerprint(raw, weights.files))


def _hub_source(spec: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))

    try:
        folder = fetch(_SMALL_FILES)
        check_config(folder, spec)  # refuse before gigabytes are fetched
        folder = fetch((*_SMALL_FILES, "*.safetensors"))
    except GatedRepoError as error:
        raise SourceError(
            f"{spec} is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{spec} has no revision {revision!r} on the Hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"no folder {spec} here and no model of that name on the Hub (a private one needs `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"no folder {spec} here, and the Hub cannot be reached ({type(error).__name__}); go online, or give the "
            "path of a folder"
        ) from error
    return _folder_source(spec, "hub", folder, folder.name)


def _why_not_that_file(path: Path) -> str:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return (
            f"{path} is pickled, which can run code when opened, and is refused; convert the model to safetensors in a "
            "place you trust and give its folder"
        )
    if path.suffix.lower() == ".safetensors":
        return f"{path} is a weight file; give the folder that holds it and config.json: {path.parent}"
    return f"{path} is not a model: give a Hugging Face folder, a .gguf file, a Hub id, `demo` or `gemma`"


def _fingerprint(config: dict[str, Any], files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start in (0, max(0, size // 2 - _SAMPLE_BYTES // 2), max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
