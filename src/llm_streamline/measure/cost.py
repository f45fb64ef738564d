"""What a choice costs, counted while it is made: layers run, times tokens. Plain numbers, no torch.

The unit of the report is one forward pass of the whole model over the calibration text. A backward counts as two
forwards. Embedding, head and the methods' own arithmetic are not counted.
"""

from dataclasses import dataclass

BACKWARD_FORWARDS = 2  # a backward through weights and states multiplies as often as two forwards


@dataclass
class Cost:
    """A running count."""

    layer_tokens: int = 0

    def forward(self, num_layers: int, num_tokens: int) -> None:
        """Add a forward of `num_tokens` through `num_layers`."""
        self.layer_tokens += num_layers * num_tokens

    def backward(self, num_layers: int, num_tokens: int) -> None:
        """Add a backward of `num_tokens` through `num_layers`."""
        self.layer_tokens += BACKWARD_FORWARDS * num_layers * num_tokens

    def passes(self, num_layers: int, num_tokens: int) -> float:
        """The count in forwards of `num_tokens` through `num_layers`."""
        return self.layer_tokens / (num_layers * num_tokens)
