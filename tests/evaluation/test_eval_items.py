import gzip
import json

import pytest
from samples import pairs, prose, questions, two_contexts, write_rows

from llm_streamline.errors import TaskError, TextError
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.items import is_choice_file, read_choice_file, with_examples
from llm_streamline.evaluation.material import gather
from llm_streamline.evaluation.passages import CONTEXT_WORDS, CONTINUATION_WORDS, continuation_task


def test_the_three_forms_are_read(tmp_path):
    plain = read_choice_file(write_rows(tmp_path / "arc.jsonl", questions()))
    assert (plain.name, len(plain.items), plain.delimiter) == ("arc", 6, " ")
    assert plain.items[0].shared_context
    wino = read_choice_file(write_rows(tmp_path / "wino.jsonl", two_contexts()))
    assert not wino.items[0].shared_context
    assert len(set(wino.items[0].continuations)) == 1
    blimp = read_choice_file(write_rows(tmp_path / "blimp.jsonl", pairs()))
    assert [item.subtask for item in blimp.items[:2]] == ["even", "odd"]


def test_gzip_and_hash(tmp_path):
    plain = read_choice_file(write_rows(tmp_path / "arc.jsonl", questions()))
    packed = tmp_path / "arc2.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "arc.jsonl").read_bytes()))
    assert read_choice_file(packed).name == "arc2"
    assert read_choice_file(packed).data_hash == plain.data_hash
    changed = write_rows(tmp_path / "arc3.jsonl", [questions()[0] | {"gold": 1}, *questions()[1:]])
    assert read_choice_file(changed).data_hash != plain.data_hash


def row(**changes):
    return json.dumps({key: value for key, value in (questions(1)[0] | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (row() + "\n{nope", "line 2: not JSON"),
        ("[1, 2]", "line 1: expected an object"),
        (row() + "\n\n" + row(id="x", gold=None), "line 3: the field 'gold' is missing"),
        (row(choices=None), "line 1: the field 'choices' is missing"),
        (row(context=None), "line 1: the field 'context' is missing"),
        (row(gold=4), "line 1: gold is 4, but there are 4 choices"),
        (row(gold=-1), "line 1: gold is -1"),
        (row(gold="A"), "line 1: 'gold' should be of type int, got 'A'"),
        (row(gold=True), "line 1: 'gold' should be of type int"),
        (row(choices=[" only"]), "at least two"),
        (row(choices=[" a", 3]), "at least two strings"),
        (row(choices=[" a", " "]), "a choice is empty"),
        (row() + "\n" + row(), "line 2: the id 'q0' was used in line 1"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, content, message):
    file = tmp_path / "quiz.jsonl"
    file.write_text(content)
    with pytest.raises(TaskError, match=message):
        read_choice_file(file)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(TaskError, match="cannot read"):
        read_choice_file(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "caf\xe9"}')
    with pytest.raises(TaskError, match="not UTF-8"):
        read_choice_file(tmp_path / "latin.jsonl")
    (tmp_path / "fake.jsonl.gz").write_text("{}")
    with pytest.raises(TaskError, match="cannot read"):
        read_choice_file(tmp_path / "fake.jsonl.gz")
    assert is_choice_file("a.jsonl.gz")
    assert not is_choice_file("arc_easy")


def test_worked_examples_stand_in_front_and_are_not_scored(tmp_path):
    task = read_choice_file(write_rows(tmp_path / "arc.jsonl", questions()))
    shown = with_examples(task, 2)
    first, second = task.items[:2]
    assert len(shown.items) == 4
    start = first.contexts[0] + first.continuations[first.gold] + "\n\n"
    start += second.contexts[0] + second.continuations[second.gold] + "\n\n"
    assert shown.items[0].contexts[0] == start + task.items[2].contexts[0]
    with pytest.raises(TaskError, match="too few for 6"):
        with_examples(task, 6)
    with pytest.raises(TaskError, match="without context"):
        with_examples(read_choice_file(write_rows(tmp_path / "b.jsonl", pairs())), 1)


def test_continuations_are_true_and_come_from_the_same_text():
    texts = [prose(2000, seed) for seed in range(2)]
    task = continuation_task(texts, num_items=20, seed=1)
    assert len(task.items) == 20
    golds = [item.gold for item in task.items]
    assert set(golds) <= set(range(4))
    assert len(set(golds)) > 1
    for item in task.items:
        assert len(item.contexts[0].split()) == CONTEXT_WORDS
        assert len(set(item.continuations)) == 4
        home = next(text for text in texts if item.contexts[0] + item.continuations[item.gold] in text)
        assert all(choice in home and len(choice.split()) == CONTINUATION_WORDS for choice in item.continuations)
    assert continuation_task(texts, num_items=20, seed=1) == task
    assert continuation_task(texts, num_items=20, seed=2) != task


def test_short_documents_lend_each_other_continuations():
    task = continuation_task([prose(70, seed) for seed in range(10)], seed=0)
    assert len(task.items) == 10
    assert all(len(set(item.continuations)) == 4 for item in task.items)


def test_too_little_text_is_refused():
    with pytest.raises(TextError, match="3 passages of 64 words"):
        continuation_task([prose(64 * 3 + 10)])
    with pytest.raises(TextError, match="repeats itself"):
        continuation_task(["word " * 1000])


def test_a_limit_that_leaves_out_subtasks_says_so(tmp_path, caplog):
    rows = [{**question, "subtask": name} for name in "abc" for question in questions()[:2]]
    rows = [{**row, "id": str(number)} for number, row in enumerate(rows)]
    write_rows(tmp_path / "sorted.jsonl", rows)
    write_rows(tmp_path / "mixed.jsonl", rows[::2] + rows[1::2])
    told = {}
    for name, limit in (("sorted", 3), ("mixed", 3), ("sorted", None)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            gather(EvaluationConfig(tasks=(str(tmp_path / f"{name}.jsonl"),), limit=limit), None)
        told[name, limit] = [record.getMessage() for record in caplog.records]
    line = "sorted: the first 3 of 6 questions are of 2 of its 3 subtasks; a file in random order asks of more"
    assert told == {("sorted", 3): [line], ("mixed", 3): [], ("sorted", None): []}
