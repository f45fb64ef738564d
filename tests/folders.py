"""Tiny models as folders: a Llama of 3 layers with a byte-level tokenizer, and ways to take such a folder apart."""

import json
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """259 tokens: three specials and one per byte; no training, no file."""
    vocab = {token: index for index, token in enumerate((*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(**overrides) -> LlamaForCausalLM:
    """A random float32 Llama of 3 layers in eval mode, seeded."""
    settings = {
        "vocab_size": 272,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def tiny_folder(
    folder: Path, *, dtype: torch.dtype = torch.float32, shards: bool = False, max_shard_size: str = "8KB", **overrides
) -> Path:
    """Save `tiny_llama` and its tokenizer as transformers does; with `shards` in files of at most `max_shard_size`."""
    model = tiny_llama(**overrides).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if shards else {}))
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON object in a file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def split_safetensors(path: Path) -> tuple[dict, bytes]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_safetensors(path: Path, header: object, data: bytes) -> None:
    """Write a safetensors file from any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
