"""From tokens to logits in two steps, so that the head runs only where a logit is needed, in pieces that fit memory.

Shapes: B sequences, T tokens, d width, V words, N selected positions.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llm_streamline.errors import NumericsError

_CHUNK_LOGITS = 2**24  # float32 logits made at once: 64 MiB
_PROBE_TOKENS = 5

# What families do to the head's output, by the config key that says how much. Data; which one applies is tested.
_AFTER_HEAD: tuple[tuple[str, Callable[[Tensor, float], Tensor]], ...] = (
    ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap),  # Gemma 2 and later
    ("logits_soft_cap", lambda logits, cap: torch.tanh(logits / cap) * cap),  # RecurrentGemma
    ("logit_scale", lambda logits, scale: logits * scale),  # Cohere
    ("logits_scaling", lambda logits, scale: logits / scale),  # Granite
    ("lm_head_multiplier", lambda logits, scale: logits * scale),  # Falcon-H1
)


class LogitReader:
    """Reads a causal language model's logits where they are wanted.

    The state entering the head is caught while the model runs its own forward (with the head on one token), then the
    head is applied in pieces. That the pieces equal the model's own logits is tested once, on a few tokens; a family
    for which they do not gives its logits itself, all at once.
    """

    def __init__(self, model: nn.Module):
        """Find out how `model` turns states into logits; runs a forward over a few tokens."""
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.takes_packed: bool | None = None  # found out when first needed, by `choices.can_pack`
        self._head = model.get_output_embeddings()
        self._after: Callable[[Tensor], Tensor] | None = None
        if self._head is not None:
            self._after = self._find_after_head()

    def _find_after_head(self) -> Callable[[Tensor], Tensor] | None:
        ids = torch.arange(1, _PROBE_TOKENS + 1, device=self.device)[None] % self.vocab_size
        with torch.inference_mode():
            own = self.model(input_ids=ids, use_cache=False).logits[0].float()
            check_finite(own.max(dim=-1).values, f"a text of {_PROBE_TOKENS} tokens")
            caught = self._caught(input_ids=ids)
            if caught is None or caught.shape[:2] != ids.shape:
                return None
            raw = self._head(caught[0])
        config = self.model.config.get_text_config()
        candidates: list[Callable[[Tensor], Tensor]] = [lambda logits: logits]
        for key, change in _AFTER_HEAD:
            amount = getattr(config, key, None)
            if isinstance(amount, (int, float)) and amount:
                candidates.append(lambda logits, change=change, amount=amount: change(logits, amount))
        scale = own.abs().max().clamp(min=1e-6)
        for candidate in candidates:
            if raw.shape == own.shape and (candidate(raw).float() - own).abs().max() <= 1e-3 * scale:
                return candidate
        return None

    def _caught(self, **inputs) -> Tensor | None:
        """Run the model and return what entered the head; the head itself sees one token."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple) -> tuple | None:
            if not args or args[0].dim() != 3:
                return None
            kept.append(args[0])
            # flattened and back: a slice keeps its strides, and bfloat16 on CPU takes a path 20 times slower for those
            return (args[0][:1, -1:].flatten()[None, None], *args[1:])

        handle = self._head.register_forward_pre_hook(keep)
        try:
            self.model(**inputs, use_cache=False)
        finally:
            handle.remove()
        return kept[0] if kept else None

    @torch.inference_mode()
    def states(self, input_ids: Tensor, **inputs) -> Tensor:
        """Run the model.

        Args:
            input_ids: (B, T) on any device.
            inputs: further arguments of the model's forward (attention_mask, position_ids).

        Returns:
            (B, T, d) the states entering the head; or (B, T, V) logits, for families whose head is not understood.
            `logits` takes either.
        """
        input_ids = input_ids.to(self.device, torch.long)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        if self._after is None:
            return self.model(input_ids=input_ids, use_cache=False, **inputs).logits
        return self._caught(input_ids=input_ids, **inputs)

    @torch.inference_mode()
    def logits(self, states_Nd: Tensor) -> Tensor:
        """Return logits (N, V), float32, for selected states (N, d) as `states` gave them."""
        if self._after is None:
            return states_Nd.float()
        return self._after(self._head(states_Nd)).float()

    @property
    def chunk(self) -> int:
        """How many positions' logits are made at once."""
        return max(1, _CHUNK_LOGITS // self.vocab_size)

    def chunks(self, states_Nd: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of the N positions, their logits (n, V) in float32), in order, in pieces that fit memory."""
        for start in range(0, len(states_Nd), self.chunk):
            piece = slice(start, min(start + self.chunk, len(states_Nd)))
            yield piece, self.logits(states_Nd[piece])

    @torch.inference_mode()
    def log_probs(self, states_Nd: Tensor, targets_N: Tensor) -> Tensor:
        """Return the log-probability (N,) of each target token, float32, on the CPU."""
        found_N = torch.empty(len(states_Nd), dtype=torch.float32, device=states_Nd.device)
        targets_N = targets_N.to(states_Nd.device, torch.long)
        for piece, logits_nV in self.chunks(states_Nd):
            chosen_n = logits_nV.gather(1, targets_N[piece, None]).squeeze(1)
            found_N[piece] = chosen_n - logits_nV.logsumexp(dim=1)
        return found_N.cpu()


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens the model can read at once; None when its config sets no limit."""
    config = model.config.get_text_config()
    found = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def check_finite(values: Tensor, where: str) -> None:
    """Raise NumericsError naming `where` unless all values are finite."""
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NumericsError(
            f"{where}: the model gives not-a-number or infinite values ({bad} of {values.numel()}). "
            "Try --dtype float32; if that does not help, its weights are broken."
        )
