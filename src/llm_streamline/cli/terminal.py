"""Printing answers: tables for people, JSON for programs, always on stdout. Heavy imports are inside the functions."""

import json
import sys
from typing import Any


def export_answer(done: Any) -> dict[str, Any]:
    """Plain data of a finished export; its warnings go to stderr."""
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return {"out": str(done.path), "dtype": done.dtype, "bytes": done.num_bytes}


def plan_of(run: str) -> Any:
    """The plan in a run's folder, or in a plan file; PlanError when there is none."""
    from llm_streamline.errors import PlanError
    from llm_streamline.plan import Plan
    from llm_streamline.report.run import load_run

    if run.endswith(".json"):
        return Plan.load(run)
    plan = load_run(run).plan
    if plan is None:
        raise PlanError(f"{run} holds no plan.json; name a plan file, or the folder of a run of compress or apply")
    return plan


def print_json(answer: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(answer))


def console() -> Any:
    """A rich console on stdout."""
    from rich.console import Console

    return Console()


def show_plan(plan: Any, preview: Any) -> None:
    """Print a plan, its preview and its candidates."""
    from llm_streamline.report.selection import cost_sentence
    from llm_streamline.report.tables import candidates_table, plan_table

    screen = console()
    screen.print(plan_table(plan, preview))
    if plan.selection:
        screen.print(f"target: {plan.selection.target} ({plan.selection.convention})", markup=False)
        for note in plan.selection.notes:
            screen.print(f"note: {note}", markup=False)
        for warning in plan.selection.warnings:
            screen.print(f"warning: {warning}", markup=False)
        cost = cost_sentence(plan.selection)
        if cost:
            screen.print(cost, markup=False)
    candidates = candidates_table(plan)
    if candidates is not None:
        screen.print(candidates)


def show_results(results: Any) -> None:
    """Print the tables of an evaluation, and the verdict on every model that was compared."""
    from llm_streamline.report.tables import before_after_table, verdict_tables

    screen = console()
    for table in (*before_after_table(results), *verdict_tables(results)):
        screen.print(table)


def stop_at_gate(results: Any | None) -> None:
    """Leave with exit code 1, saying why, if the evaluation asked for the gate and a model fails it."""
    if results is None or not results.provenance.config.get("gate"):
        return
    from llm_streamline.evaluation.evaluate import gate_failures

    failures = gate_failures(results)
    for failure in failures:
        print(f"gate: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1)


def show_outcome(outcome: Any, as_json: bool) -> None:
    """Print what a run left behind."""
    if as_json:
        answer = {
            "out": str(outcome.out),
            "plan": outcome.plan.model_dump(mode="json"),
            "preview": vars(outcome.preview),
            "proof": outcome.proof.model_dump(mode="json") if outcome.proof else None,
            "results": outcome.results.model_dump(mode="json") if outcome.results else None,
            "report": str(outcome.report) if outcome.report else None,
        }
        print_json(answer)
        return
    screen = console()
    if outcome.results:
        from llm_streamline.report.tables import generation_table

        show_results(outcome.results)
        screen.print(generation_table(outcome.results))
    else:
        show_plan(outcome.plan, outcome.preview)
    print(f"checkpoint: {outcome.out}")
    if outcome.report:
        print(f"report:     {outcome.report}")


def show_leaderboard(data: dict[str, Any], records: list[Any], as_json: bool) -> None:
    """Print how the runs of a call ended, the default that the rule picks for each budget, and where the page is."""
    if as_json:
        print_json({**data, "runs": [record.model_dump(mode="json") for record in records]})
        return
    for record in records:
        print(f"{record.status:8} {record.label}" + (f"  {record.reason}" if record.reason else ""))
    done, waiting = len(data["rows"]), len(data["not_finished"])
    print(f"{done} rows; {waiting} runs refused, failed or still to be done")
    for tokens, choice in data["default"].items():
        print(f"{int(tokens):,} training tokens: {choice.get('reason') or choice['none']}")
    print(f"page: {data['page']}")
