"""What is simulated: a model's shape, a recipe and a span; and what one token costs on its way through. No torch here.

A matrix product costs two operations for each weight and token; a query and each position it sees two for each number
in the query and two for each in the value. Letters: L layers, d width, T tokens in a window, V vocabulary.
"""

from dataclasses import dataclass, replace

from llm_streamline.config import Recipe
from llm_streamline.errors import PlanError
from llm_streamline.plan import Network
from llm_streamline.simulate.shape import LayerShape, ModelShape
from llm_streamline.sizing import decide_size
from llm_streamline.training.reach import auto_reach, with_reach

FLOAT32 = 4


@dataclass(frozen=True)
class Task:
    """What is simulated: a model, a recipe, and the span that will be replaced."""

    shape: ModelShape
    recipe: Recipe
    start: int
    stop: int

    @classmethod
    def of(cls, shape: ModelShape, recipe: Recipe) -> "Task":
        """Turn the recipe's target into a span; where none is given by hand it lies in the middle.

        Raises:
            PlanError: the target or the span does not fit the number of layers.
        """
        sizes = [layer.parameters for layer in shape.layers]
        if recipe.selection.span:
            start, stop = recipe.selection.span
            if stop > shape.num_layers:
                raise PlanError(f"the span {start}:{stop} runs past the last layer ({shape.num_layers - 1})")
            return cls(shape, recipe, start, stop)
        removed = decide_size(recipe.target, recipe.replacement.network(), sizes, shape.parameters).num_removed
        start = (shape.num_layers - removed + 1) // 2
        return cls(shape, recipe, start, start + removed)

    def settled(self, memory_bytes: float, sharded: bool) -> "Task":
        """With `training.trainable` decided as a run would, where it says auto.

        Args:
            memory_bytes: of one device.
            sharded: the original's weights are split over several devices.
        """
        if self.recipe.training.trainable != "auto":
            return self
        shape, has_network = self.shape, self.network is not None
        reach = auto_reach(
            self.recipe, has_network, shape.weight_bytes, shape.parameters_in_layers, memory_bytes, sharded
        )
        return replace(self, recipe=with_reach(self.recipe, reach))

    @property
    def network(self) -> Network | None:
        """What is put back."""
        return self.recipe.replacement.network()

    @property
    def put_back(self) -> tuple[LayerShape, ...]:
        """The shape of what is put back, as layers."""
        if self.network is None:
            return ()
        template = self.shape.layers[self.start]
        if self.network.kind == "layer":
            return (template,) * self.network.count
        d = self.shape.hidden_size
        if self.network.follows_a_layer:
            matrices, widths = (d * d if self.network.kind in ("linear", "patch") else d), d
        else:
            widths = self.network.width or template.inner
            matrices = (2 if self.network.kind == "ffn" else 3) * d * widths
        plain = replace(template, query_width=0, value_width=0, inner=widths)
        return (replace(plain, parameters=matrices, multiplied=matrices, inputs=d + widths, outputs=d + widths),)

    @property
    def parameters_put_back(self) -> int:
        """Parameters of what is put back."""
        return sum(layer.parameters for layer in self.put_back)

    @property
    def is_trained(self) -> bool:
        """Whether anything is."""
        training = self.recipe.training
        return bool(training.tokens) and (self.network is not None or training.heals)

    @property
    def trains_head(self) -> bool:
        """Whether the head is among what is trained."""
        return self.recipe.training.trainable in ("head", "full")

    @property
    def parameters_trained(self) -> int:
        """Parameters that get a gradient; adapters and norms, which are few, are not counted."""
        trained = sum(layer.parameters for layer in self.student()[0])
        if self.recipe.training.trainable == "full":
            return trained + self.shape.parameters - self.shape.parameters_in_layers
        return trained + (self.shape.head_parameters if self.trains_head else 0)

    @property
    def resume_at(self) -> int:
        """Boundary below which edited and original model are the same, in training too: nothing there runs twice."""
        rung, num_layers = self.recipe.training.trainable, self.shape.num_layers - self.stop + self.start
        if rung == "head":
            return min(self.start, max(0, num_layers + len(self.put_back) - self.recipe.training.heal.last_layers))
        return 0 if rung in ("lora", "norms", "full") else self.start

    def student(self, whole: bool = True) -> tuple[tuple[LayerShape, ...], tuple[LayerShape, ...]]:
        """Layers of the edited model that training runs, from `resume_at` on: those that it changes, and the others.

        Args:
            whole: up to the head; otherwise no further than what was put back.
        """
        rung, layers = self.recipe.training.trainable, self.shape.layers
        edited = [(layer, rung == "full") for layer in layers[: self.start]]
        edited += [(layer, True) for layer in self.put_back]
        end = None if whole else len(edited)
        edited += [(layer, rung in ("above", "full")) for layer in layers[self.stop :]]
        if rung == "head":
            last = max(0, len(edited) - self.recipe.training.heal.last_layers)
            edited[last:] = [(layer, True) for layer, _ in edited[last:]]
        run = edited[self.resume_at : end]
        return tuple(layer for layer, trains in run if trains), tuple(layer for layer, trains in run if not trains)

    @property
    def parameters_after(self) -> int:
        """Parameters of the result; what corrects a layer is folded away, but for a patch."""
        gone = sum(layer.parameters for layer in self.shape.layers[self.start : self.stop])
        folded = self.network is None or (self.network.follows_a_layer and self.network.kind != "patch")
        back = 0 if folded else self.parameters_put_back
        return self.shape.parameters - gone + back


# --- operations and bytes of one token


def layers_flops(layers: tuple[LayerShape, ...], seq_len: int) -> float:
    """Operations of a forward through `layers`, for one token of a window of `seq_len`."""
    return sum(
        2 * layer.multiplied + 2 * (layer.query_width + layer.value_width) * _positions_seen(layer, seq_len)
        for layer in layers
    )


def _positions_seen(layer: LayerShape, seq_len: int) -> float:
    """Mean number of positions a query sees: half the window, or less where the layer looks back only so far."""
    if layer.window is None or layer.window >= seq_len:
        return (seq_len + 1) / 2
    first = layer.window * (layer.window + 1) / 2  # the first queries see fewer
    return (first + (seq_len - layer.window) * layer.window) / seq_len


def layers_bytes(layers: tuple[LayerShape, ...], hidden_size: int, element: int) -> float:
    """Bytes that a forward through `layers` reads and writes for one token, weights aside.

    Each matrix reads its input and writes its output; each output is read and written once more on its way to the next
    (activation, rotary embedding, residual), and the two norms read and write the state in float32.
    """
    one = [element * (layer.inputs + 3 * layer.outputs) + 4 * FLOAT32 * hidden_size for layer in layers]
    return float(sum(one))


def _weights(layers: tuple[LayerShape, ...], element: int) -> float:
    return float(sum(layer.parameters for layer in layers) * element)


@dataclass(frozen=True)
class Pass:
    """A forward, for one token: operations and bytes; and the weights it reads and layers it calls once a batch."""

    flops: float
    activation_bytes: float
    weight_bytes: float
    calls: float = 0.0

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(
            self.flops + other.flops,
            self.activation_bytes + other.activation_bytes,
            self.weight_bytes + other.weight_bytes,
            self.calls + other.calls,
        )

    def times(self, count: float) -> "Pass":
        """So many of them."""
        return Pass(self.flops * count, self.activation_bytes * count, self.weight_bytes * count, self.calls * count)


def forward(task: Task, layers: tuple[LayerShape, ...], seq_len: int, element: int | None = None) -> Pass:
    """A forward through some of the layers; `element` is the bytes of a weight, the model\'s own when left out."""
    element = element or task.shape.element_bytes
    return Pass(
        layers_flops(layers, seq_len),
        layers_bytes(layers, task.shape.hidden_size, element),
        _weights(layers, element),
        len(layers),
    )


def head(task: Task) -> Pass:
    """The head, and a loss over its logits in float32."""
    shape = task.shape
    logits = shape.vocab_size * (2 * shape.element_bytes + 3 * FLOAT32)
    return Pass(2.0 * shape.head_parameters, float(logits), float(shape.head_parameters * shape.element_bytes))
