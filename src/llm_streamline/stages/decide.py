"""The stage that decides: statistics become a plan, by the recipe's method or with the span given by hand."""

from llm_streamline import ranks
from llm_streamline.config import Recipe
from llm_streamline.data.windows import Windows
from llm_streamline.measure.files import Statistics
from llm_streamline.measure.probe import Probe
from llm_streamline.methods.choosing import spans_plan
from llm_streamline.plan import ModelFacts, Plan, Selection
from llm_streamline.runtimes import with_warnings
from llm_streamline.sources import LoadedModel
from llm_streamline.stages.measure import measure
from llm_streamline.stages.original import model_facts
from llm_streamline.stages.start import trial_start
from llm_streamline.stages.wishes import check_span, method_wishes


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
        start=lambda plan: trial_start(loaded, plan, recipe, windows, probe.cost),
        batch_tokens=recipe.calibration.batch_tokens,
        seed=recipe.seed,
        calibration=windows["calibration"],
        at_once=loaded.fitted.candidates_at_once if loaded.fitted else None,
    )
    if recipe.selection.span:
        return with_warnings(loaded.model.config, _span_by_hand(recipe, facts))
    size, found, config = method_wishes(loaded, recipe)
    plan = found.run(probe, config)
    while not size.is_met_by(plan):
        size = size.one_more(config.network.num_layers_added if config.network else 0)
        config = config.model_copy(update={"num_removed": size.num_removed})
        plan = found.run(probe, config)
    selection = plan.selection or Selection(method=found.name, target="", convention="")
    counted = {"convention": selection.convention or size.convention, "cost": probe.forward_passes}
    selection = selection.model_copy(update={"target": size.target, **counted})
    return with_warnings(loaded.model.config, plan.model_copy(update={"selection": selection}))


def _span_by_hand(recipe: Recipe, facts: ModelFacts) -> Plan:
    span, network = recipe.selection.span, recipe.replacement.network()
    removed, added = check_span(recipe, facts.num_layers)
    plan = spans_plan(facts, network, [span])
    convention = f"{removed} layers leave, {added} come back, {facts.num_layers - removed + added} remain"
    selection = Selection(method="by hand", target=f"the span {span[0]}:{span[1]}", convention=convention, chosen=span)
    return plan.model_copy(update={"selection": selection})


def _first(windows: Windows, num_tokens: int) -> Windows:
    return Windows(input_ids=windows.input_ids[: max(1, num_tokens // windows.seq_len)])
