"""A Hugging Face tokenizer as GGUF metadata: tokens, merges or scores, pre-tokenizer, special ids, chat template.

Two kinds can be told to llama.cpp: byte-level BPE (`gpt2` there: GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece-like
BPE with byte fallback (`llama` there: Llama 2, Mistral, Gemma). V tokens.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kinds of tokens, numbered as in the GGUF format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a tokenizer cuts text before its merges, written as below -> llama.cpp's name of it.
_PRE_TOKENIZERS = {
    "ByteLevel": "gpt-2",
    "Digits > ByteLevel": "smollm",
    f"Split {_LLAMA3} > bytes": "llama-bpe",
    f"Split {_LLAMA3.replace('{1,3}', '')} > bytes": "qwen2",
}
_MAX_EOG = 8


def tokenizer_metadata(folder: Path, vocab_size: int, *, pre: str | None = None) -> dict[str, Any]:
    """Everything about the tokenizer of a folder that a GGUF file states; full keys -> values.

    Args:
        folder: a Hugging Face folder with tokenizer.json.
        vocab_size: V, rows of the embedding; ids without a token are filled up as unused.
        pre: llama.cpp's name of the pre-tokenizer, where we cannot tell.

    Raises:
        SourceError: no tokenizer.json, more tokens than V, or a tokenizer that llama.cpp has no counterpart for.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SourceError(f"{folder} has no tokenizer.json; load and save its tokenizer with transformers to get one")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise SourceError(f"llama.cpp is told of BPE tokenizers here, {folder} has a {raw['model']['type']} one")
    byte_level = "ByteLevel" in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
    tokens, kinds = _tokens(raw, vocab_size, byte_level)
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if byte_level else "llama",
        "tokenizer.ggml.pre": pre or (_pre_tokenizer(raw, folder) if byte_level else "default"),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    if not raw["model"]["merges"]:
        raise SourceError(f"the tokenizer of {folder} has no merges, without which llama.cpp opens no file")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in raw["model"]["merges"]]
    if byte_level:
        values["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    else:
        values["tokenizer.ggml.scores"] = _scores(tokens, kinds, merges)
    values |= _special_ids(tokenizer, folder)
    values |= _habits(tokenizer, raw)
    return values | _chat_templates(tokenizer)


def _tokens(raw: dict[str, Any], vocab_size: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """(V,) texts and (V,) kinds."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    added = {entry["id"]: entry for entry in raw["added_tokens"]}
    known = {index: token for token, index in raw["model"]["vocab"].items()}
    known |= {index: entry["content"] for index, entry in added.items()}
    if max(known) >= vocab_size:
        raise SourceError(f"the tokenizer knows the id {max(known)}, the model has {vocab_size} embeddings")
    unknown = raw["model"].get("unk_token")
    for index, token in known.items():
        tokens[index], kinds[index] = token, NORMAL
        if index in added:
            kinds[index] = CONTROL if added[index]["special"] else USER_DEFINED
            if not added[index]["special"]:
                tokens[index] = token.replace("\u2581", " ")  # llama.cpp looks for these in the text as it stands
        elif not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = BYTE
        if token == unknown and not byte_level:
            kinds[index] = UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], kinds: list[int], merges: list[list[str]]) -> list[float]:
    """(V,) scores that make llama.cpp, which joins the pair with the highest score, join in the order of the merges."""
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        rank.setdefault(left + right, place)
    last = float(len(merges))
    return [
        -1000.0 if kind not in (NORMAL, USER_DEFINED) else -float(rank.get(token, last))
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _pre_tokenizer(raw: dict[str, Any], folder: Path) -> str:
    parts = _flatten(raw.get("pre_tokenizer") or {})
    written = []
    for part in parts:
        kind = part["type"]
        if kind == "Digits":
            kind = "Digits" if part.get("individual_digits") else "Digits together"
        elif kind == "Split":
            pattern = part["pattern"].get("Regex") or part["pattern"].get("String")
            kind = f"Split {pattern}" if part["behavior"] == "Isolated" else f"Split {part['behavior']} {pattern}"
        elif kind == "ByteLevel":
            kind = ("ByteLevel" if part.get("use_regex", True) else "bytes") + (
                " with prefix space" if part.get("add_prefix_space") else ""
            )
        written.append(kind)
    name = _PRE_TOKENIZERS.get(" > ".join(written))
    if name is None:
        raise SourceError(
            f"the tokenizer of {folder} cuts text in a way whose name in llama.cpp is not known here "
            f"({' > '.join(written)}); give that name (`pre`), or use llama.cpp's convert_hf_to_gguf.py on the folder"
        )
    return name


def _flatten(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for inner in part["pretokenizers"] for item in _flatten(inner)] if "pretokenizers" in part else [part]


def _special_ids(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
    values = {}
    for ours, theirs in names.items():
        index = getattr(tokenizer, f"{ours}_token_id", None)
        if isinstance(index, int):
            values[f"tokenizer.ggml.{theirs}_token_id"] = index
    ends = _generation_ends(folder)
    more = [index for index in ends if index != values.get("tokenizer.ggml.eos_token_id")]
    if more and "tokenizer.ggml.eos_token_id" in values:
        values["tokenizer.ggml.eot_token_id"] = more[0]
    elif more:
        values["tokenizer.ggml.eos_token_id"] = more[0]
    return values


def _generation_ends(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return [index for index in ends if isinstance(index, int)][:_MAX_EOG]


def _habits(tokenizer: "PreTrainedTokenizerBase", raw: dict[str, Any]) -> dict[str, Any]:
    """What the tokenizer does by itself, found by trying."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    values: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": len(full) > len(plain) and full[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": len(full) > len(plain) and full[-1] == tokenizer.eos_token_id,
    }
    settings = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    metaspace = any(part.get("prepend_scheme") in ("first", "always") for part in _flatten(raw["pre_tokenizer"] or {}))
    values["tokenizer.ggml.add_space_prefix"] = '"Prepend"' in settings or metaspace
    return values


def _chat_templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    template = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {name: text for name, text in template.items() if name != "default"}
    values = {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    if named:
        values["tokenizer.chat_templates"] = sorted(named)
    if "default" in template:
        values["tokenizer.chat_template"] = template["default"]
    return values
