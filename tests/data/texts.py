"""What the tests of the text side share: small tokenizers with known manners, and made-up documents."""

import gzip
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SENTENCE = """
river stone walks under seven quiet lamps because morning bread costs little and nobody counts the birds again when
old maps fold into green letters from a harbour where ships carry salt paper glass iron wool
"""
WORDS = _SENTENCE.split()


def document(number: int, num_words: int = 60) -> str:
    """A document of its own, always the same for the same number."""
    source = random.Random(number)
    words = [source.choice(WORDS) for _ in range(num_words)]
    return f"Document {number}. " + " ".join(words) + "."


def documents(count: int, num_words: int = 60, start: int = 0) -> list[str]:
    return [document(start + number, num_words) for number in range(count)]


def tiny_tokenizer(bos: bool = False, eos: bool = True, vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE: ids 0 <pad>, 1 <s>, 2 </s>. `bos`: whether it puts <s> before a text by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(20), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>" if eos else None
    )


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    content = "".join(json.dumps({field: text, "n": n}) + "\n" for n, text in enumerate(texts))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path
