"""A byte-level tokenizer with two merges: the smallest that llama.cpp opens."""

from folders import CHAT_TEMPLATE, SPECIALS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def merging_tokenizer(pre_tokenizer=None) -> PreTrainedTokenizerFast:
    """261 tokens: three specials, one per byte, `ab` and `abc`."""
    tokens = (*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc")
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE with byte fallback, as Gemma's: spaces become U+2581, no prefix."""
    from tokenizers import normalizers, processors

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "n"), ("an", "d")]
    tokens = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
