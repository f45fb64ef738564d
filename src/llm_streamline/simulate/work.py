"""The work of every stage of a run, in operations and bytes, before it is shared out among devices. No torch here.

What one token costs is in `task.py`. A backward through weights that stay costs as much as the forward, through trained
ones twice as much. Letters: d width, V vocabulary.
"""

import math
from dataclasses import dataclass

from llm_streamline.simulate.task import FLOAT32, Pass, Task, forward, head

STARTS_TRIED = 5  # by init `best`: first, last, average, identity and the closed form
TRIAL_TOKENS = 4_096  # validation tokens that each start is tried on
PROMPTS, PROMPT_TOKENS = 6, 16  # of the generation check
ITEM_TOKENS = 96  # of a question with its choices packed behind it
DEFAULT_ITEMS = 200  # of the continuation task, when no limit is given
HELD_OUT_TOKENS = 16_384  # a run's own evaluation text at most
ADAM_COPIES = 3  # gradients and Adam's two moments, float32 like the weights they belong to


@dataclass(frozen=True)
class Work:
    """One stage, all devices together.

    A stage is a number of equal batches; each device takes whole batches, so that more devices than batches are idle.
    Only a training step is shared by windows.
    """

    stage: str
    flops: float  # in matrix products and attention
    activation_bytes: float  # read and written between the products
    weight_bytes: float  # read for one batch
    calls: int  # forwards and backwards of single layers in one batch
    batches: int
    shared: bool = True  # whether devices share it; otherwise one works and the others wait
    step_windows: int = 0  # training: windows of one optimiser step, on all devices together
    batch_windows: int = 0  # training: windows run at once on one device
    reduced_bytes: float = 0.0  # that each device exchanges after one step (gradients) ...
    gathered_bytes: float = 0.0  # ... or once in the whole stage (statistics, losses)
    disk_bytes: float = 0.0
    memory_bytes: float = 0.0  # on each device, weights included
    weights_held: float = 0.0  # part of `memory_bytes` that a sharded teacher divides by the number of devices


def work_of(task: Task) -> tuple[Work, ...]:
    """The stages of `compress`, in order."""
    stages = [_load(task), _analyze(task), _verify(task)]
    if task.network is not None:
        stages.append(_begin(task))
    if task.is_trained:
        stages += _train(task)
    return tuple(stage for stage in (*stages, _surgery(task), *_evaluate(task)) if stage is not None)


def _of(stage: str, one: Pass, tokens: float, batch_tokens: int, **more) -> Work:
    batches = max(1, math.ceil(tokens / batch_tokens))
    return Work(
        stage, one.flops * tokens, one.activation_bytes * tokens, one.weight_bytes, round(one.calls), batches, **more
    )


# --- stages


def _load(task: Task) -> Work:
    size = float(task.shape.weight_bytes)
    return Work("load", 0.0, 2 * size, 0.0, 0, 1, shared=False, disk_bytes=size, memory_bytes=size, weights_held=size)


def _analyze(task: Task) -> Work:
    shape, calibration, seq_len = task.shape, task.recipe.calibration, task.recipe.text.seq_len
    boundaries, d = shape.num_layers + 1, shape.hidden_size
    gram = Pass(2.0 * boundaries**2 * d, boundaries * d * (shape.element_bytes + 6 * FLOAT32), 0.0)
    batch = max(seq_len, calibration.batch_tokens)
    sums = 8.0 * 64 * boundaries**2  # float64, 64 groups of windows
    states = batch * boundaries * d * shape.element_bytes + _working_set(task, batch) + 4 * sums
    return _of(
        "analyze", forward(task, shape.layers, seq_len) + gram, calibration.tokens, batch,
        gathered_bytes=sums,
        memory_bytes=shape.weight_bytes + states,
        weights_held=float(shape.weight_bytes),
    )  # fmt: skip


def _verify(task: Task) -> Work | None:
    selection, seq_len = task.recipe.selection, task.recipe.text.seq_len
    if selection.span or not selection.verify:
        return None
    shape = task.shape
    above = forward(task, (*task.put_back, *shape.layers[task.stop :]), seq_len) + head(task)
    one = forward(task, shape.layers, seq_len) + head(task) + above.times(selection.verify)
    batch = max(seq_len, task.recipe.calibration.batch_tokens)
    logits = batch * shape.vocab_size * shape.element_bytes
    held = shape.weight_bytes + selection.verify * task.parameters_put_back * (shape.element_bytes + FLOAT32)
    return _of(
        "verify candidates", one, selection.verify_tokens, batch,
        gathered_bytes=8.0 * selection.verify_tokens / seq_len * (selection.verify + 1),
        memory_bytes=held + logits + _working_set(task, batch) + batch * shape.hidden_size * shape.element_bytes,
        weights_held=float(shape.weight_bytes),
    )  # fmt: skip


def _begin(task: Task) -> Work:
    """Trials of starts, and the closed form: one stage, because both read the same layers below."""
    shape, recipe, seq_len = task.shape, task.recipe, task.recipe.text.seq_len
    init, batch = recipe.replacement.init, max(seq_len, recipe.calibration.batch_tokens)
    edited = forward(task, (*shape.layers[: task.start], *task.put_back, *shape.layers[task.stop :]), seq_len)
    trials = STARTS_TRIED * min(TRIAL_TOKENS, recipe.training.validation_tokens) if init == "best" else 0
    fitted = recipe.replacement.fit_tokens if init in ("best", "closed_form") else 0
    inner = task.put_back[-1].inner if task.network.kind != "linear" else shape.hidden_size
    moments = Pass(2.0 * inner * (inner + shape.hidden_size), FLOAT32 * 4.0 * inner, 0.0)
    fit = forward(task, shape.layers[: task.stop], seq_len) + forward(task, task.put_back, seq_len) + moments
    solve = inner**3 / 3 + 2.0 * inner**2 * shape.hidden_size if fitted else 0.0
    one = edited + head(task)
    flops = one.flops * trials + fit.flops * fitted + solve
    moved = one.activation_bytes * trials + fit.activation_bytes * fitted
    system = 8.0 * inner * (3 * inner + 3 * shape.hidden_size) if fitted else 0.0
    held = shape.weight_bytes + task.parameters_put_back * FLOAT32 * (STARTS_TRIED if init == "best" else 1)
    return Work(
        "start of the network", flops, moved, one.weight_bytes, round(one.calls),
        max(1, math.ceil((trials + fitted) / batch)),
        gathered_bytes=system / 3,
        memory_bytes=held + system + _working_set(task, batch) + batch * shape.vocab_size * shape.element_bytes,
        weights_held=float(shape.weight_bytes),
    )  # fmt: skip


def step_passes(task: Task) -> tuple[Pass, Pass]:
    """One token of training: the teacher's forward, and the forward and backward of the student."""
    shape, objective, seq_len = task.shape, task.recipe.training.objective, task.recipe.text.seq_len
    needs_logits, runs_on = _looks_at(task)
    if "kl" in objective:
        teacher = forward(task, shape.layers, seq_len) + head(task)
    else:
        stop = shape.num_layers if "hidden" in objective else task.stop if "mse" in objective else task.resume_at
        teacher = forward(task, shape.layers[:stop], seq_len)
    trained, passed = _student(task, runs_on)
    student = trained.times(3) + passed.times(2)
    if needs_logits:
        student = student + head(task).times(3 if task.trains_head else 2)
    return teacher, student


def _looks_at(task: Task) -> tuple[bool, bool]:
    """Whether the objective looks at predictions, and whether at states above what is put back."""
    objective = task.recipe.training.objective
    needs_logits = bool({"lm", "kl"} & objective.keys())
    return needs_logits, needs_logits or "hidden" in objective


def _student(task: Task, whole: bool) -> tuple[Pass, Pass]:
    """A forward of one token through the student's layers that train, which are float32, and through the others."""
    trained, passed = task.student(whole)
    seq_len = task.recipe.text.seq_len
    return forward(task, trained, seq_len, FLOAT32), forward(task, passed, seq_len)


def _train(task: Task) -> tuple[Work, ...]:
    shape, training, seq_len = task.shape, task.recipe.training, task.recipe.text.seq_len
    teacher, student = step_passes(task)
    one = teacher + student
    batch_windows = training.per_device_train_batch_size
    step_windows = batch_windows * training.gradient_accumulation_steps
    batch = batch_windows * seq_len
    memory = shape.weight_bytes + training_memory(task, batch)
    held = {"memory_bytes": memory, "weights_held": float(shape.weight_bytes)}
    update = 2.0 * ADAM_COPIES * FLOAT32 * task.parameters_trained / training.gradient_accumulation_steps
    trained = Work(
        "train", one.flops * training.tokens, one.activation_bytes * training.tokens, one.weight_bytes + update,
        round(one.calls), max(1, math.ceil(training.tokens / batch)),
        step_windows=step_windows, batch_windows=batch_windows,
        reduced_bytes=float(FLOAT32 * task.parameters_trained), **held,
    )  # fmt: skip
    changed, passed = _student(task, whole=True)
    return trained, _of("validate", teacher + changed + passed + head(task), validation_tokens(task), batch, **held)


def validation_tokens(task: Task) -> int:
    """Tokens of all validations of a training, the one before its first step included."""
    return (task.recipe.training.num_evals + 1) * task.recipe.training.validation_tokens


def training_memory(task: Task, batch_tokens: int) -> float:
    """Bytes beside the original's weights: what is trained, its gradients and moments, kept activations, logits.

    A backward keeps, of every layer that it goes through, the inputs of its matrices and of the products between them.
    """
    shape, training = task.shape, task.recipe.training
    needs_logits, runs_on = _looks_at(task)
    through = [layer for layers in task.student(runs_on) for layer in layers]
    kept = sum(shape.element_bytes * (layer.inputs + layer.outputs) for layer in through)
    kept += len(through) * 2 * FLOAT32 * shape.hidden_size  # float32 states inside the norms
    copies = task.parameters_trained * FLOAT32 * (2 + ADAM_COPIES)  # weights, best state, gradients, moments
    copies += task.parameters_trained * shape.element_bytes  # autocast's half-precision weights
    # the student's, their gradient before and after it is weighted, and the teacher's
    num_logits = 3 + ("kl" in training.objective) if needs_logits else 0
    logits = num_logits * shape.vocab_size * shape.element_bytes
    boundary_states = 2 * shape.hidden_size * shape.element_bytes
    return copies + batch_tokens * (kept + logits + boundary_states) + _working_set(task, batch_tokens) / 2


def _surgery(task: Task) -> Work:
    """Write the edited weights and read them back in a fresh process, beside the model in memory."""
    shape, after = task.shape, float(task.parameters_after * task.shape.element_bytes)
    flops = 2 * 512 * (2.0 * task.parameters_after)  # the proof's two short texts, in memory and reloaded
    return Work(
        "save and prove", flops, 0.0, after, shape.num_layers, 2, shared=False, disk_bytes=2 * after,
        memory_bytes=shape.weight_bytes + after, weights_held=float(shape.weight_bytes),
    )  # fmt: skip


def _evaluate(task: Task) -> tuple[Work, ...]:
    shape, config, seq_len = task.shape, task.recipe.evaluation, task.recipe.text.seq_len
    edited_layers = (
        *shape.layers[: task.start],
        *(task.put_back if task.network and task.network.kind != "linear" else ()),
        *shape.layers[task.stop :],
    )
    context = min(config.context or 1024, shape.max_positions or 1024)
    held = float(shape.weight_bytes + task.parameters_after * shape.element_bytes)
    batch = config.batch_tokens
    memory = held + batch * (shape.vocab_size * 2 * FLOAT32 / 8 + shape.hidden_size * 4)
    memory += _working_set(task, batch)

    def both(length: int) -> Pass:
        return forward(task, shape.layers, length) + forward(task, edited_layers, length) + head(task).times(2)

    scored = min(config.tokens or HELD_OUT_TOKENS, HELD_OUT_TOKENS) + len(config.perplexity) * (
        config.tokens or 262_144
    )
    items = (config.limit or DEFAULT_ITEMS) * max(1, len(config.tasks))
    more = {"memory_bytes": memory, "weights_held": held}
    stages = [
        _of("evaluate: perplexity", both(context if config.perplexity else seq_len), scored, batch, **more),
        _of("evaluate: tasks", both(ITEM_TOKENS), items * ITEM_TOKENS, batch, **more),
    ]
    alone = {"shared": False, **more}
    if config.generation:  # one token a step, each reading all weights of one of the two models
        steps = (1 + config.samples) * config.max_new_tokens
        one = both(PROMPT_TOKENS + config.max_new_tokens)
        tokens = PROMPTS * (steps + PROMPT_TOKENS)
        stages.append(
            Work(
                "evaluate: generation",
                one.flops * tokens,
                one.activation_bytes * tokens,
                held,
                round(one.calls),
                steps,
                **alone,
            )
        )
    if config.speed:
        rounds = config.speed_rounds + 1
        length = (config.speed_prompt_tokens or 256) + config.speed_new_tokens
        one, tokens = both(length), rounds * config.speed_batch_size * length
        steps = rounds * (config.speed_new_tokens + 1)
        calls = round(one.calls)
        stages.append(
            Work("evaluate: speed", one.flops * tokens, one.activation_bytes * tokens, held, calls, steps, **alone)
        )
    return tuple(stages)


def _working_set(task: Task, batch_tokens: int) -> float:
    """What one layer's forward holds at its height: the outputs of its MLP, and a state in float32."""
    widest = max(layer.outputs for layer in task.shape.layers)
    return batch_tokens * (task.shape.element_bytes * widest + 3 * FLOAT32 * task.shape.hidden_size)
