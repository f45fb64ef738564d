"""Checkpoints of a given shape with random weights, written shard by shard: no more than one tensor is in memory.

The tokenizer is a small byte-level BPE, trained in seconds on the prose that every Python installation carries.
"""

from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from llm_streamline.data.spec import parse_spec
from llm_streamline.data.text import open_text
from llm_streamline.export.shards import num_bytes, parse_size, split_shards, write_shards
from llm_streamline.output import check_room
from llm_streamline.sources.weights import TensorHeader

SHAPES = {  # Llama-2-7B's, and smaller ones of the same proportions for trials
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "0.3b": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16},
    "0.05b": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8},
}
_VOCABULARY = 32_000
_SPECIALS = ("<pad>", "<s>", "</s>")


def make_checkpoint(folder: Path, shape: str) -> int:
    """Write a bfloat16 Llama of the given shape and return its bytes on disk.

    Raises:
        OutputError: the disk has too little room.
    """
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        **SHAPES[shape],
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    headers = {name: TensorHeader("BF16", tuple(tensor.shape)) for name, tensor in skeleton.state_dict().items()}
    size = sum(num_bytes(header) for header in headers.values())
    check_room(folder.parent, round(1.1 * size))
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def random_tensor(name: str) -> torch.Tensor:
        shape = headers[name].shape
        if len(shape) == 1:  # norms
            return torch.ones(shape, dtype=torch.bfloat16)
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        piece = torch.randn(shape[0], min(shape[1], 1024), generator=generator, dtype=torch.bfloat16)  # drawing is slow
        piece = piece.repeat(1, -(-shape[1] // piece.shape[1]))[:, : shape[1]]
        return piece.mul_(scale)

    write_shards(folder, split_shards(headers.items(), parse_size("2GB")), headers, random_tensor)
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return size


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4_000,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in islice(open_text(parse_spec("builtin")).records(), 200))
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
