import json

import pytest
from samples import loaded
from test_eval_evaluate import config, files  # noqa: F401 - a fixture

from llm_streamline.evaluation import evaluate as evaluation
from llm_streamline.evaluation import reference
from llm_streamline.evaluation.evaluate import evaluate


@pytest.fixture
def measured(monkeypatch):
    """Names of the models whose questions were scored."""
    names, real = [], evaluation.measure_tasks
    monkeypatch.setattr(
        evaluation, "measure_tasks", lambda subject, *rest: names.append(subject.name) or real(subject, *rest)
    )
    return names


@pytest.mark.parametrize("divergence", [True, False])
def test_what_is_remembered_gives_the_same_results(files, measured, divergence):  # noqa: F811
    kept, wishes = files / "original.json", config(files, divergence=divergence, speed=False)
    plain = evaluate(loaded("small", seed=1), loaded("big"), wishes)
    first = evaluate(loaded("small", seed=1), loaded("big"), wishes, out=files / "1" / "r.json", reference=kept)
    again = evaluate(loaded("small", seed=1), loaded("big"), wishes, out=files / "2" / "r.json", reference=kept)
    assert measured == ["original", "small", "original", "small", "small"]
    assert plain.without_times() == first.without_times() == again.without_times()
    for log in (files / "1" / "items").rglob("*.jsonl"):
        assert log.read_bytes() == (files / "2" / log.relative_to(files / "1")).read_bytes()


def test_another_model_other_questions_or_a_damaged_file_are_measured_anew(files, measured):  # noqa: F811
    kept = files / "original.json"

    def run(original="big", **changes):
        measured.clear()
        evaluate(loaded("small", seed=1), loaded(original), config(files, speed=False, **changes), reference=kept)
        return measured == ["original", "small"]

    assert run()
    assert not run()
    assert run(limit=3)
    assert not run(limit=3)
    assert run("bigger")
    content = json.loads(kept.read_text())
    content["tasks"][0]["acc"] = 1.0
    kept.write_text(json.dumps(content))
    assert run("bigger")
    kept.write_text("[]")
    assert run("bigger")
    kept.write_text("{")
    assert run("bigger")


def test_versions_are_part_of_what_is_known(files, measured, monkeypatch):  # noqa: F811
    kept = files / "original.json"
    for version in ("1", "2"):
        monkeypatch.setattr(reference, "versions", lambda version=version: {"torch": version})
        evaluate(loaded("small", seed=1), loaded("big"), config(files, speed=False), reference=kept)
    assert measured == ["original", "small"] * 2
