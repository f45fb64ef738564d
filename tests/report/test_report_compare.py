"""Many runs: differences first, best values, warnings where protocols differ; and the tables of the terminal."""

import json
import math

import pytest
from report_samples import plan, results, training, write_run, write_three
from rich.console import Console

from llm_streamline.errors import StreamlineError
from llm_streamline.report.compare import compare, load_runs, pareto_plots, write_comparison
from llm_streamline.report.run import load_run
from llm_streamline.report.tables import (
    Preview,
    before_after_table,
    candidates_table,
    comparison_tables,
    generation_table,
    plan_table,
    stability_table,
    verdict_tables,
)


def printed(*things, width=120):
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        for thing in things:
            console.print(thing)
    return capture.get()


@pytest.fixture
def paths(tmp_path):
    return write_three(tmp_path)


def test_only_settings_that_differ_are_listed_and_the_seed_last(paths):
    found = compare(load_runs(paths))
    assert [entry.key for entry in found.entries] == ["0", "A", "B", "C"]
    assert [name for name, _ in found.differences] == [
        "target.layers",
        "training.objective.kl",
        "training.objective.mse",
        "seed",
    ]
    assert dict(found.differences)["target.layers"] == ("–", "9", "9", "5")


def test_the_best_of_each_column_is_never_the_original(paths):
    found = compare(load_runs(paths))
    ratio = found.column("perplexity ratio")
    assert ratio.values == pytest.approx((1.0, math.exp(0.88), math.exp(1.9), math.exp(0.21)))
    assert ratio.best == {3}
    assert found.column("parameters").best == {1, 2}


def test_the_page_has_four_plots_and_no_network(paths, tmp_path):
    page = write_comparison(paths, tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count('class="chart scatter"') == 4
    assert "Read with care" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_unlike_protocols_are_called_out(paths):
    folder = paths[2] / "streamline"
    data = json.loads((folder / "results.json").read_text())
    for model in data["models"]:
        model["perplexity"][0]["context"] = 128
        model["tasks"] = model["tasks"][:2]
    (folder / "results.json").write_text(json.dumps(data))
    warnings = " ".join(compare(load_runs(paths)).warnings)
    assert "Not comparable, the protocols differ: perplexity on wikitext2-valid.txt" in warnings
    assert "different tasks" in warnings


def test_result_files_alone_and_several_models_in_one_file(tmp_path):
    one, two = results(name="a"), results(gap=0.1, name="b")
    both = one.model_copy(
        update={"models": (*one.models, two.models[1]), "comparisons": (*one.comparisons, *two.comparisons)}
    )
    (tmp_path / "results.json").write_text(both.model_dump_json())
    found = compare(load_runs([tmp_path / "results.json"]))
    assert [(entry.key, entry.name) for entry in found.entries][1:] == [("A", "a"), ("B", "b")]
    assert len(pareto_plots(found)) == 4


def test_a_run_alone_compares_with_its_original(tmp_path):
    found = compare(load_runs([write_run(tmp_path / "run")]))
    assert found.differences == ()
    assert all(not column.best for column in found.columns)


def test_a_run_without_results_is_refused(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("results.json",))
    with pytest.raises(StreamlineError, match="no results to compare"):
        load_runs([out])


def test_hostile_names_are_escaped(tmp_path):
    out = write_run(tmp_path / "<b>run", result=results(name="<script>alert(1)</script>"))
    page = write_comparison([out], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert "<b>run" not in page


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_its_terminal(width):
    text = printed(*before_after_table(results()), width=width)
    assert "…" not in text
    assert "\u00a0" not in text
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert "2.41 ×" in lines["perplexity"]
    assert "[2.38, 2.44]" in lines["perplexity"]
    assert ("[14.64, 15.89]" in lines["perplexity"]) == (width > 100)


def test_names_with_brackets_are_text_not_markup():
    text = printed(*before_after_table(results(name="[bold]model[/bold]")))
    assert "[bold]model[/bold]" in text


def test_the_verdict_states_its_thresholds():
    text = printed(*verdict_tables(results()))
    assert text.startswith("Much quality was lost")
    assert "partly lost up to 2.00 ×" in text


def test_every_model_has_its_verdict_by_name():
    one, two = results(name="a"), results(gap=0.1, name="b")
    models, comparisons = (*one.models, two.models[1]), (*one.comparisons, *two.comparisons)
    text = printed(*verdict_tables(one.model_copy(update={"models": models, "comparisons": comparisons})))
    assert "a: Much quality was lost" in text
    assert "\nb: " in text


def test_the_preview_of_a_plan():
    full = Preview(
        parameters=(134_515_008, 102_654_144),
        kv_bytes_per_token=(23_040, 16_128),
        prefill_speedup=1.31,
        train_tokens=262_144,
        train_seconds=231.4,
        peak_memory_bytes=1_400_000_000,
        saving_seconds={"write": 0.5, "start": 6.0, "reload": 0.25, "forwards": 2.0},
    )
    text = printed(plan_table(plan(), full))
    assert "30 -> 21 layers" in text
    assert "−23.7 %" in text
    assert "3 min 51 s" in text
    assert "1.40 GB" in text
    (saving,) = (line for line in text.splitlines() if line.startswith("saving here"))
    (proof,) = (line for line in text.splitlines() if line.startswith("proof here"))
    assert "500.0 ms" in saving
    assert "8.2 s" in proof
    assert "evaluating are not in these times" in " ".join(text.split())
    assert "decode speed" not in text
    assert "parameters" not in printed(plan_table(plan()))


def test_the_candidates_table_marks_the_chosen():
    text = printed(candidates_table(plan()))
    assert "layers 12–21 (chosen)" in text.splitlines()[1]
    assert candidates_table(plan().model_copy(update={"selection": None})) is None


def test_the_comparison_in_the_terminal(paths):
    text = printed(*comparison_tables(load_runs(paths)), width=100)
    assert text.index("What differs") < text.index("What came of it")
    assert "layer-mse" in text
    assert "…" not in text


def test_the_objective_is_told_in_words(tmp_path):
    out = write_run(tmp_path / "run", leave_out=("training.json",))
    (out / "streamline" / "training.json").write_text(json.dumps(training() | {"objective": {"kl": 1.0, "mse": 0.5}}))
    assert load_run(out).training.objective_words() == "on 1 KL + 0.5 MSE"


def test_stability_in_the_terminal_names_the_script_for_what_it_is():
    text = printed(stability_table(results().comparisons[0]), width=100)
    row = next(line for line in text.splitlines() if line.startswith("arc_easy"))
    for cell in ("PPL", "78.8", "71.8", "70.8", "226", "66", "< 0.001", "6.4"):
        assert cell in row
    assert "mean of all" in text
    assert "published script" in text
    assert "…" not in text


def test_texts_stand_side_by_side():
    text = printed(generation_table(results()), width=100)
    assert "original" in text
    assert "clockmaker" in text
    assert "flour of the" in text
    assert "clockmaker" not in printed(generation_table(results(), most=2), width=100)
    silent = [m.model_copy(update={"generation": None}) for m in results().models]
    assert generation_table(results().model_copy(update={"models": tuple(silent)})) is None


def test_control_codes_of_a_model_do_not_reach_the_terminal():
    whole = results()
    made = whole.models[1].generation
    rude = made.model_copy(
        update={"continuations": (made.continuations[0].model_copy(update={"text": "a\x1b[2Jb\x9bc"}),)}
    )
    models = (whole.models[0], whole.models[1].model_copy(update={"generation": rude}))
    text = printed(generation_table(whole.model_copy(update={"models": models})))
    assert "a\N{REPLACEMENT CHARACTER}[2Jb" in text
    assert "\x1b" not in text
    assert "\x9b" not in text
