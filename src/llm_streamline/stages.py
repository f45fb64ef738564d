"""The stages of a run: what each does, and the checks before them. When a stage is skipped is told in `resume.py`."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from llm_streamline import ranks
from llm_streamline.arch import check_architecture, get_layers
from llm_streamline.budget import Fit
from llm_streamline.config import Recipe, Target
from llm_streamline.data.prepare import WindowNeed, prepare_windows
from llm_streamline.data.text import open_text
from llm_streamline.data.windows import Windows, check_disjoint
from llm_streamline.engines import check_engines
from llm_streamline.errors import ConfigError, PlanError
from llm_streamline.estimate import training_forward_tokens
from llm_streamline.evaluation.latency import confirm_latency, latency_cost
from llm_streamline.evaluation.size import kv_bytes_of_layers
from llm_streamline.layer_config import text_config
from llm_streamline.logs import get_logger
from llm_streamline.measure.cost import Cost as ForwardCost
from llm_streamline.measure.files import Statistics, StatsInfo
from llm_streamline.measure.partial import run_tapped
from llm_streamline.measure.probe import Probe
from llm_streamline.measure.stats import CosineStats
from llm_streamline.measure.stream import observe
from llm_streamline.memory_limits import free_memory
from llm_streamline.methods.choosing import spans_plan
from llm_streamline.methods.registry import Method, MethodConfig, find_method
from llm_streamline.output import write_text
from llm_streamline.packed import num_numbers
from llm_streamline.plan import ModelFacts, Network, Plan, Replace, Selection, templates_for
from llm_streamline.replacements.base import Replacement
from llm_streamline.replacements.build import build_replacements
from llm_streamline.replacements.starts import quick_start
from llm_streamline.runtime import peak_memory, reset_peak_memory, seed_everything, versions
from llm_streamline.runtimes import with_warnings
from llm_streamline.schema import parse
from llm_streamline.sizing import Cost, Decided, decide_size
from llm_streamline.sources import LoadedModel, ModelSource, load_config, load_model
from llm_streamline.training.begin import StartSettings, begin, keep_start, kept_start
from llm_streamline.training.compiled import compiled
from llm_streamline.training.heal import Healed, check_healing
from llm_streamline.training.sharding import shard_teacher
from llm_streamline.training.states import CachedStates, StateRequest, cached_states, check_cacheable
from llm_streamline.training.student import Student
from llm_streamline.training.trainer import num_windows_seen, train_student

_TRIAL_FIT_TOKENS = 8_192  # that a network is fitted on while plans are compared
log = get_logger()


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what its method brings: the network that belongs to it, unless the user names one.

    Raises:
        MethodNotFoundError: if there is no such method.
    """
    own = find_method(recipe.selection.method).replacement
    if not own or recipe.selection.span or "kind" in recipe.replacement.model_fields_set:
        return recipe
    given = recipe.replacement.model_dump(include=recipe.replacement.model_fields_set)
    replacement = parse(type(recipe.replacement), {**own, **given}, f"replacement of method {recipe.selection.method}")
    return recipe.model_copy(update={"replacement": replacement})


def check_early(source: ModelSource, recipe: Recipe, *, with_text: bool = True) -> None:
    """Refuse, from the model's configuration alone, what would fail after hours.

    Args:
        source: the model.
        recipe: what is wished for.
        with_text: whether the recipe's windows are run through the model.

    Raises:
        ArchitectureError: if the family is not edited.
        MissingExtraError: if the recipe names an engine that is not installed.
        ConfigError: if the machine cannot do what the recipe names, a window is longer than the model's positions, or
            the method is unknown.
        PlanError: if the target or the span does not fit the number of layers.
    """
    check_engines(recipe)
    config = load_config(source)
    check_architecture(config)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if with_text and positions and recipe.text.seq_len > positions:
        raise ConfigError(
            f"windows of {recipe.text.seq_len} tokens are longer than the model's {positions} positions; "
            f"use --seq-len {positions} or less"
        )
    if recipe.cache_states:
        check_cacheable(recipe.training.objective, recipe.training.trainable)
    counts_sublayers = find_method(recipe.selection.method).counts_sublayers
    if counts_sublayers and recipe.target.limited and not recipe.selection.span:
        raise PlanError(
            f"{recipe.selection.method} silences sublayers, which stay in the checkpoint as zeros, so no target of "
            f"{recipe.target.limited} is reached; give their number as layers (--layers)"
        )
    num_layers, span = text.num_hidden_layers, recipe.selection.span
    if span and span[1] > num_layers:
        raise PlanError(
            f"the span {span[0]}:{span[1]} runs past the last layer (the model has layers 0-{num_layers - 1})"
        )
    if recipe.target.layers is not None and not span:
        decide_size(recipe.target, recipe.replacement.network(), [1] * num_layers, num_layers)


def check_wishes(loaded: LoadedModel, recipe: Recipe) -> None:
    """Refuse, before anything is written or measured, a target, span or method option that cannot be met.

    Raises:
        PlanError: if the target or the span does not fit the model.
        ConfigError: if the method does not take its options.
        ArchitectureError: if this architecture cannot hold such a network.
        MissingExtraError: if the recipe trains adapters and peft is not installed.
    """
    facts, network = model_facts(loaded), recipe.replacement.network()
    check_healing(loaded.model, recipe.training, has_network=network is not None)
    if recipe.selection.span:
        span = recipe.selection.span
        _check_span(recipe, facts.num_layers)
    else:
        size, found, config = _method_wishes(loaded, recipe)
        config.check_fits(facts.num_layers)
        if found.check:
            found.check(loaded.model, config)
        first = 1 if network and network.follows_a_layer else 0  # there must be a layer before
        span = (first, min(first + size.num_removed, facts.num_layers))
    if network:  # built once for any span, to hear now whether this architecture can hold it
        edit = Replace(start=span[0], stop=span[1], network=network, templates=templates_for(network, *span))
        build_replacements(loaded.model, Plan(model=facts, edits=(edit,)))


def check_text(loaded: LoadedModel, recipe: Recipe) -> None:
    """Open every text, before anything is written; nothing is read through.

    Raises:
        TextError: if a text is missing or is no text.
    """

    def open_all() -> None:
        for spec in recipe.text.sources:
            open_text(spec, model=loaded.model, tokenizer=loaded.tokenizer, seed=recipe.seed)

    ranks.from_main(open_all)


def model_facts(loaded: LoadedModel) -> ModelFacts:
    """What a plan keeps of the model."""
    return facts_of(loaded.source, loaded.model)


def facts_of(source: ModelSource, model: torch.nn.Module) -> ModelFacts:
    """What a plan keeps of a model whose weights need not be there."""
    text = model.config.get_text_config()
    return ModelFacts(
        spec=source.spec,
        fingerprint=source.fingerprint,
        model_type=text.model_type,
        num_layers=len(get_layers(model)),
        hidden_size=text.hidden_size,
        num_parameters=sum(num_numbers(p) for p in model.parameters()),
    )


def make_windows(
    loaded: LoadedModel, recipe: Recipe, roles: tuple[str, ...], folder: Path | None
) -> dict[str, Windows]:
    """Make the windows of some roles; kept in `folder` and used again when nothing they depend on has changed."""
    seq_len = recipe.text.seq_len
    budgets = {
        "calibration": recipe.calibration.tokens,
        "train": max(recipe.training.tokens, recipe.replacement.fit_tokens),
        "validation": max(recipe.training.validation_tokens, recipe.selection.verify_tokens),
        "evaluation": min(recipe.evaluation.tokens or 16_384, 16_384),
    }
    needs = {role: WindowNeed(max(budgets[role], seq_len), seq_len) for role in roles}

    def prepare() -> dict[str, Windows] | None:
        made = prepare_windows(
            recipe.text.sources, loaded.tokenizer, needs, seed=recipe.seed, folder=folder, model=loaded.model
        )
        for first, second in combinations(made.values(), 2):
            check_disjoint(first, second)
        kept.append(made)
        return made if folder is None else None  # what lies in the folder need not be sent

    kept: list[dict[str, Windows]] = []
    sent = ranks.from_main(prepare)
    windows = kept[0] if kept else sent or {role: Windows.load(folder / role) for role in roles}
    for role, found in windows.items():
        log.info("%s text: %s tokens in %d windows", role, f"{found.num_tokens:,}", len(found))
    return windows


def measure(loaded: LoadedModel, calibration: Windows, recipe: Recipe) -> Statistics:
    """One pass over the calibration windows.

    Raises:
        NumericsError: if a layer's output is not finite; the message names the layer.
    """
    facts = model_facts(loaded)
    sums = CosineStats(facts.num_layers)
    reset_peak_memory()
    seconds = observe(loaded.model, calibration, sums, recipe.calibration.batch_tokens, "measuring similarities")
    sums.require_data()
    info = StatsInfo(
        model=facts,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        num_tokens=sums.num_tokens,
        count_first=sums.count_first,
        count_rest=sums.count_rest,
        num_windows=len(calibration),
        seq_len=calibration.seq_len,
        batch_tokens=recipe.calibration.batch_tokens,
        seconds=round(seconds, 3),
        layer_seconds_per_token=seconds / (sums.num_tokens * facts.num_layers),
        peak_memory_bytes=max(peak_memory().host_bytes, peak_memory().device_bytes),
        machine=versions(),
        text=dict(calibration.provenance),
    )
    return Statistics(sums, info)


def decide(loaded: LoadedModel, recipe: Recipe, statistics: Statistics | None, windows: dict[str, Windows]) -> Plan:
    """Choose the edits: by the method, or the span given by hand.

    Args:
        loaded: the original.
        recipe: target, selection, replacement.
        statistics: of the calibration pass; None has the pass made when the method asks for it.
        windows: calibration, train and validation.

    Raises:
        PlanError: if the target does not fit the model.
    """
    # every rank runs the method, because they share its passes over the text; rank 0's plan is the one that counts
    plan = _decide(loaded, recipe, statistics, windows)
    return ranks.from_main(lambda: plan)


def _decide(loaded: LoadedModel, recipe: Recipe, statistics: Statistics | None, windows: dict[str, Windows]) -> Plan:
    facts = model_facts(loaded)
    measured = [statistics] if statistics else []

    def get_statistics() -> Statistics:
        if not measured:
            measured.append(measure(loaded, windows["calibration"], recipe))
        return measured[0]

    probe = Probe(
        model=loaded.model,
        facts=facts,
        measure=get_statistics,
        validation=_first(windows["validation"], recipe.selection.verify_tokens),
        start=lambda plan: _started(loaded, plan, recipe, windows, probe.cost),
        batch_tokens=recipe.calibration.batch_tokens,
        seed=recipe.seed,
        calibration=windows["calibration"],
        at_once=loaded.fitted.candidates_at_once if loaded.fitted else None,
    )
    if recipe.selection.span:
        return with_warnings(loaded.model.config, _span_by_hand(recipe, facts))
    size, found, config = _method_wishes(loaded, recipe)
    plan = found.run(probe, config)
    while not size.is_met_by(plan):
        size = size.one_more(config.network.num_layers_added if config.network else 0)
        config = config.model_copy(update={"num_removed": size.num_removed})
        plan = found.run(probe, config)
    selection = plan.selection or Selection(method=found.name, target="", convention="")
    counted = {"convention": selection.convention or size.convention, "cost": probe.forward_passes}
    selection = selection.model_copy(update={"target": size.target, **counted})
    return with_warnings(loaded.model.config, plan.model_copy(update={"selection": selection}))


def _method_wishes(loaded: LoadedModel, recipe: Recipe) -> tuple[Decided, Method, MethodConfig]:
    """The target as a number of layers, the method, and its options."""
    network = recipe.replacement.network()
    size = _decided_size(loaded, recipe, network)
    found = find_method(recipe.selection.method)
    options = {"num_removed": size.num_removed, "network": network, "verify": recipe.selection.verify}
    return size, found, parse(found.config, {**options, **recipe.selection.options}, f"options of method {found.name}")


def _decided_size(loaded: LoadedModel, recipe: Recipe, network: Network | None) -> Decided:
    """The target as a number of layers; what takes a measurement is measured once for a model and a target."""
    model, target = loaded.model, recipe.target
    known = _MEASURED.setdefault(model, {})
    wish = (target, network)
    if wish not in known:
        sizes = [sum(num_numbers(p) for p in layer.parameters()) for layer in get_layers(model)]
        costs = {target.limited: _cost(model, target)} if target.limited in ("memory", "kv_cache", "latency") else {}
        size = decide_size(target, network, sizes, model_facts(loaded).num_parameters, costs)
        if target.limited == "latency":
            size = confirm_latency(model, size, network.num_layers_added if network else 0, target.latency)
        known[wish] = size
    return known[wish]


_MEASURED: WeakKeyDictionary[torch.nn.Module, dict[Any, Decided]] = WeakKeyDictionary()


def _cost(model: torch.nn.Module, target: Target) -> Cost:
    if target.limited == "latency":
        log.info("measuring the latency of one layer")
        return latency_cost(model)
    if target.limited == "kv_cache":
        layers = kv_bytes_of_layers(model, target.kv_context or 1)
        return Cost(sum(layers), tuple(layers))
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in get_layers(model)]
    return Cost(sum(p.numel() * p.element_size() for p in model.parameters()), tuple(layers))


def _span_by_hand(recipe: Recipe, facts: ModelFacts) -> Plan:
    span, network = recipe.selection.span, recipe.replacement.network()
    removed, added = _check_span(recipe, facts.num_layers)
    plan = spans_plan(facts, network, [span])
    convention = f"{removed} layers leave, {added} come back, {facts.num_layers - removed + added} remain"
    selection = Selection(method="by hand", target=f"the span {span[0]}:{span[1]}", convention=convention, chosen=span)
    return plan.model_copy(update={"selection": selection})


def _check_span(recipe: Recipe, num_layers: int) -> tuple[int, int]:
    """Layers that leave and come back with the span given by hand."""
    span, network = recipe.selection.span, recipe.replacement.network()
    removed, added = span[1] - span[0], network.num_layers_added if network else 0
    if span[1] > num_layers or removed - added < 1 or num_layers - removed + added < 1:
        raise PlanError(
            f"the span {span[0]}:{span[1]} with {added} layer(s) put back does not make a smaller model of "
            f"{num_layers} layers (0-{num_layers - 1})"
        )
    return removed, added


def _first(windows: Windows, num_tokens: int) -> Windows:
    return Windows(input_ids=windows.input_ids[: max(1, num_tokens // windows.seq_len)])


@dataclass(frozen=True)
class Trained:
    """What training made of a plan."""

    replacements: list[Replacement]
    healed: Healed | None  # the original's own weights, where the recipe trains some
    history: dict[str, Any] | None  # the log; None when nothing was trained


def train(loaded: LoadedModel, plan: Plan, recipe: Recipe, windows: dict[str, Windows], folder: Path) -> Trained:
    """Start and train what the recipe trains; what was done already is taken from `folder`."""
    seed_everything(recipe.seed)
    settings = StartSettings.of(recipe.replacement, recipe.calibration.batch_tokens, recipe.seed)
    if ranks.from_main(lambda: kept_start(folder) is not None):
        kept, trials = kept_start(folder)
        replacements = build_replacements(loaded.model, plan)
        torch.nn.ModuleList(replacements).load_state_dict(kept)
    else:
        replacements, trials = begin(loaded.model, plan, windows["train"], windows["validation"], settings)
        ranks.from_main(lambda: keep_start(folder, replacements, trials))
    training, healed = recipe.training, None
    if training.tokens and training.heals:
        healed = Healed(loaded.model, plan, replacements, training, recipe.seed)
    if not replacements and healed is None:
        return Trained(replacements, None, None)
    shard_teacher(loaded.model, training)
    student = Student(loaded.model, plan, replacements, training, healed)
    history: dict[str, Any] = {"starts": trials}
    if training.tokens:
        states = _cached_states(loaded, student, recipe, windows["train"]) if recipe.cache_states else None
        data, checkpoints = (windows["train"], windows["validation"]), folder / "checkpoints"
        with compiled(replacements) if training.torch_compile else nullcontext():
            history |= train_student(student, training, *data, checkpoints, recipe.seed, states)
        history["forward_tokens"] = training_forward_tokens(loaded.model, plan, training, history["tokens"])
    return Trained(replacements, healed, history)


def _started(
    loaded: LoadedModel, plan: Plan, recipe: Recipe, windows: dict[str, Windows], cost: ForwardCost
) -> list[Replacement]:
    """The plan's networks as training would start them, to compare plans: fitted to a little text where they are
    nothing without it, otherwise at a start that costs nothing.
    """
    if not any(isinstance(edit, Replace) and edit.network.is_fitted for edit in plan.edits):
        return untrained(loaded, plan, recipe.seed)
    settings = StartSettings.of(recipe.replacement, recipe.calibration.batch_tokens, recipe.seed)
    settings = replace(settings, fit_tokens=min(settings.fit_tokens, _TRIAL_FIT_TOKENS), epochs=1)
    replacements = begin(loaded.model, plan, windows["train"], windows["validation"], settings)[0]
    tokens = min(settings.fit_tokens, windows["train"].num_tokens)
    resumed = min(edit.start for edit in plan.edits)
    for replacement in replacements:  # the original to the end of the span, the edited model to where it is now
        cost.forward(replacement.edit.stop + max(0, replacement.out - resumed), tokens)
    return replacements


def _cached_states(loaded: LoadedModel, student: Student, recipe: Recipe, windows: Windows) -> CachedStates:
    """The original's states at both ends of the spans, from the cache that the recipe names."""
    request = StateRequest(
        model=f"{loaded.source.fingerprint} {arithmetic(loaded, recipe)}",
        dtype=str(loaded.dtype).removeprefix("torch."),
        windows=windows.provenance["sha256"],
        num_windows=num_windows_seen(recipe.training, windows),
        seq_len=windows.seq_len,
        width=text_config(loaded.model.config).hidden_size,
        enters=student.resume_at,
        leaves=tuple(replacement.edit.stop for replacement in student.replacements),
    )
    place, batch_tokens = Path(recipe.cache_states), recipe.calibration.batch_tokens
    return ranks.main_first(lambda: cached_states(loaded.model, windows, request, place, batch_tokens))


def untrained(loaded: LoadedModel, plan: Plan, seed: int) -> list[Replacement]:
    """The plan's networks at a start that needs no text."""
    replacements = build_replacements(loaded.model, plan)
    for replacement in replacements:
        quick_start(replacement, loaded.model, seed)
    return replacements


@torch.inference_mode()
def time_layers(loaded: LoadedModel, recipe: Recipe) -> float:
    """Seconds that one layer's forward takes for one token here: the faster of two passes over one window."""
    length = min(recipe.text.seq_len, 512)
    ids = torch.zeros(1, length, dtype=torch.long, device=loaded.device)
    num_layers, times = min(len(get_layers(loaded.model)), 4), []  # enough to tell, on a model of any depth
    for _ in range(2):
        started = time.perf_counter()
        states, _ = run_tapped(loaded.model, {"input_ids": ids}, stop=num_layers)
        float(states[num_layers].flatten()[0])  # waits for an accelerator
        times.append(time.perf_counter() - started)
    return min(times) / (length * num_layers)


def load_original(source: ModelSource, recipe: Recipe, fitted: Fit | None = None) -> LoadedModel:
    """Load the model as the recipe says, with all generators seeded; what was fitted into a limit stays on disk."""
    seed_everything(recipe.seed)
    log.info("loading %s", source.spec)
    on_disk = fitted is not None and fitted.layers_on_disk
    loaded = load_model(
        source,
        recipe.dtype,
        recipe.device,
        attention=recipe.attn_implementation,
        quantization=recipe.quantization,
        layers_on_disk=on_disk,
    )
    loaded.fitted = fitted
    return loaded


def unpack(loaded: LoadedModel, recipe: Recipe) -> None:
    """Put the original's own weights in the place of packed ones: what is cut is the original."""
    if recipe.quantization == "none":
        return
    loaded.model = None  # the two are never in memory together
    free_memory()
    loaded.model = load_original(loaded.source, recipe.model_copy(update={"quantization": "none"})).model


def arithmetic(loaded: LoadedModel, recipe: Recipe) -> str:
    """What the numbers that a model yields depend on beside its weights."""
    return f"{loaded.dtype} {recipe.attn_implementation} {recipe.quantization}"


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe with every default."""
    write_text(folder / "recipe.yaml", recipe.to_yaml())
