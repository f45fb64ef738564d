"""llama.cpp itself, through the binding `cyllama` (a wheel on PyPI), as the judge of our files."""

from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="the llama.cpp binding cyllama is not installed")
llama_cpp.disable_logging()


class _Model(llama_cpp.LlamaModel):
    @property
    def n_vocab(self) -> int:  # cyllama's own contexts ask the model for it
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A GGUF file opened by llama.cpp on the CPU with one thread and float32 caches."""

    def __init__(self, path: Path, context: int = 256):
        settings = llama_cpp.LlamaModelParams()
        settings.n_gpu_layers = 0
        self.model = _Model(str(path), settings, verbose=False)
        options = llama_cpp.LlamaContextParams()
        options.n_ctx = options.n_batch = context
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0  # float32
        options.flash_attn_type = 0
        self.context = llama_cpp.LlamaContext(self.model, options, verbose=False)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(T, V) of a fresh sequence."""
        self.context.kv_cache_clear()
        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for place, token in enumerate(tokens):
            batch.add(int(token), place, [0], True)
        self.context.decode(batch)
        return np.array([self.context.get_logits_ith(place) for place in range(len(tokens))])

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The tokens and `count` more, each the most probable."""
        self.context.kv_cache_clear()
        found, todo = list(tokens), list(tokens)
        batch = llama_cpp.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
        for _ in range(count):
            batch.reset()
            start = len(found) - len(todo)
            for place, token in enumerate(todo):
                batch.add(int(token), start + place, [0], place == len(todo) - 1)
            self.context.decode(batch)
            todo = [int(np.argmax(self.context.get_logits_ith(-1)))]
            found += todo
        return found

    def tokenize(self, text: str) -> list[int]:
        """Ids with the special tokens that the file asks for."""
        return list(self.model.get_vocab().tokenize(text, True, True))
