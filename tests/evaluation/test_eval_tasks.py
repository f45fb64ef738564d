"""Tasks through lm-evaluation-harness; what needs it is skipped where it is not installed."""

import importlib.util
import json
import math
import sys

import pytest
from folders import byte_tokenizer
from samples import loaded, pairs, questions, tiny, two_contexts, write_rows

from llm_streamline.errors import MissingExtraError, NumericsError, TaskError
from llm_streamline.evaluation.answers import answers_of_rows, answers_of_samples
from llm_streamline.evaluation.choices import score_task
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.evaluate import evaluate
from llm_streamline.evaluation.items import read_choice_file, with_examples
from llm_streamline.evaluation.logits import LogitReader
from llm_streamline.evaluation.material import check_config
from llm_streamline.evaluation.outcome import as_lines, item_rows, task_result
from llm_streamline.evaluation.stability import compare_answers
from llm_streamline.evaluation.tasks import check_task_names, run_choice_task, run_harness

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="extra `tasks` not installed")


def numbered(rows):
    return list(zip(rows, range(1, len(rows) + 1), strict=True))


@needs_lm_eval
@pytest.mark.parametrize("rows", [questions, two_contexts, pairs], ids=["contexts", "two contexts", "no context"])
def test_our_scorer_agrees_with_the_harness_item_by_item(rows, tmp_path):
    task = read_choice_file(write_rows(tmp_path / "quiz.jsonl", rows()))
    if rows is questions:
        task = with_examples(task, 1)
    model, tokenizer = tiny(), byte_tokenizer()
    scored = score_task(task, LogitReader(model), tokenizer)
    ours, theirs = task_result(task, scored), run_choice_task(model, tokenizer, task, batch_size=2)
    by_id = {sample["doc"]["id"]: sample for sample in theirs.samples}
    assert len(by_id) == len(task.items)
    for one in scored:
        sample = by_id[one.item.id]
        assert one.loglikelihoods == pytest.approx([ll for ll, _ in sample["filtered_resps"]], abs=2e-4)
        assert (one.prediction == one.item.gold) == bool(sample["acc"])
        if one.item.shared_context:
            assert (one.prediction_norm == one.item.gold) == bool(sample["acc_norm"])
    for key in ("name", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "num_items", "data_hash"):
        assert getattr(ours, key) == pytest.approx(getattr(theirs.result, key)), key
    assert theirs.result.scorer == "lm-eval"


def yaml_task(folder, rows, **changes):
    """Write a folder with one YAML task on these questions; returns the folder's name."""
    folder.mkdir(parents=True)
    data = write_rows(folder / "data.jsonl", rows)
    settings = {"task": "my_quiz", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    settings |= {"dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}}
    settings |= {"doc_to_text": "{{context}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
    settings |= {"metric_list": [{"metric": "acc"}]} | changes
    (folder / "quiz.yaml").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return str(folder)


@needs_lm_eval
def test_a_folder_of_yaml_tasks_and_stability_of_its_samples(tmp_path):
    folder = yaml_task(tmp_path / "mine", questions())
    found = [run_harness(tiny(seed=s), byte_tokenizer(), [folder], limit=4)[0] for s in (0, 1)]
    assert [one.result.name for one in found] == ["my_quiz"] * 2
    assert found[0].result.num_items == 4
    both = [answers_of_samples(numbered(one.samples), "my_quiz", "memory") for one in found]
    result = compare_answers(*both, "nll", bootstrap=0)
    assert result.acc_original == found[0].result.acc
    assert result.acc_model == found[1].result.acc
    # the log as written gives the same answers as the samples in memory
    reread = [json.loads(line) for line in as_lines(found[0].samples).splitlines()]
    assert answers_of_samples(numbered(reread), "my_quiz", "memory") == both[0]


@needs_lm_eval
def test_a_task_that_writes_has_its_metrics_and_no_answers(tmp_path):
    writes = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[gold]}}"}
    writes |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": [{"metric": "exact_match"}]}
    folder = yaml_task(tmp_path / "writes", questions(), **writes)
    quick = EvaluationConfig(tasks=(folder,), limit=2, speed=False, generation=False)
    found = evaluate(loaded(seed=1), loaded(), quick)
    task = found.models[1].tasks[0]
    assert (task.acc, [metric.name for metric in task.metrics]) == (None, ["exact_match"])
    assert found.comparisons[0].stability == ()
    assert found.provenance.data_hashes == {"my_quiz": task.data_hash}
    assert found.provenance.versions["lm_eval"]


@needs_lm_eval
@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, r"lm-eval could not run my_quiz \("),
        (questions(), {"doc_to_text": "{{context"}, r"lm-eval could not run my_quiz \(TemplateSyntaxError: "),
        (questions(), {"doc_to_choice": "options"}, r"lm-eval could not run my_quiz \("),
        ([*questions(1), {**questions(2)[1], "gold": 7}], {}, "question 1: gold is 7, but there are 4 choices"),
    ],
)
def test_what_the_harness_cannot_run_is_one_sentence(tmp_path, rows, changes, message):
    folder = yaml_task(tmp_path / "mine", rows, **changes)
    with pytest.raises(TaskError, match=message) as caught:
        run_harness(tiny(), byte_tokenizer(), [folder])
    assert "\n" not in str(caught.value)


@needs_lm_eval
def test_a_folder_without_a_task_is_refused_before_the_model_runs(tmp_path):
    with pytest.raises(TaskError, match="holds no YAML task"):
        check_config(EvaluationConfig(tasks=(str(tmp_path),)))


@needs_lm_eval
@pytest.mark.slow
def test_unknown_names_are_refused_and_near_ones_offered():
    check_task_names(["arc_easy", "mmlu"])
    with pytest.raises(TaskError, match=r"no task 'arc_eazy'\. Did you mean 'arc_easy'"):
        check_task_names(["arc_easy", "arc_eazy"])


@needs_lm_eval
def test_not_a_number_in_the_harness_is_told(tmp_path):
    task = read_choice_file(write_rows(tmp_path / "quiz.jsonl", questions()))
    model = tiny()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericsError, match="question"):
        run_choice_task(model, byte_tokenizer(), task)


def test_the_extra_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"llm-streamline\[tasks\]"):
        check_task_names(["arc_easy"])
    with pytest.raises(MissingExtraError):  # before a model is loaded
        check_config(EvaluationConfig(tasks=("continuation",), scorer="lm-eval"))


def test_rows_in_memory_and_on_disk_give_the_same_answers(tmp_path):
    task = read_choice_file(write_rows(tmp_path / "quiz.jsonl", questions()))
    rows = item_rows(task, score_task(task, LogitReader(tiny()), byte_tokenizer()))
    reread = [json.loads(line) for line in as_lines(rows).splitlines()]
    answers = answers_of_rows(numbered(rows), "quiz")
    assert answers == answers_of_rows(numbered(reread), "quiz")
    assert all(math.isfinite(value) for one in answers.items for value in one.nll)
