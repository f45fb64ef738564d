import json
import subprocess
import sys

import pytest
import torch
from folders import byte_tokenizer
from samples import loaded, pairs, prose, questions, two_contexts, write_rows

from llm_streamline.data.windows import Windows
from llm_streamline.errors import ConfigError, NumericsError, OutputError, StreamlineError, TaskError, TextError
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.evaluate import evaluate, gate_failures
from llm_streamline.evaluation.material import check_config
from llm_streamline.evaluation.result import Results
from llm_streamline.evaluation.stability import stability


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prose.txt").write_text(prose(1200))
    write_rows(tmp_path / "quiz.jsonl", questions())
    write_rows(tmp_path / "wino.jsonl", two_contexts())
    write_rows(tmp_path / "pairs.jsonl", pairs())
    return tmp_path


def config(files, **changes):
    settings = {
        "perplexity": (str(files / "prose.txt"),),
        "context": 64,
        "tokens": 600,
        "tasks": (str(files / "quiz.jsonl"), str(files / "pairs.jsonl"), f"continuation:{files / 'prose.txt'}"),
        "limit": 4,
        "max_new_tokens": 8,
        "speed_prompt_tokens": 8,
        "speed_new_tokens": 2,
        "speed_rounds": 2,
        "bootstrap": 50,
    }
    return EvaluationConfig(**(settings | changes))


def test_everything_at_once_is_the_same_for_a_seed_but_for_times(files):
    runs = []
    for folder in ("one", "two"):
        out = files / folder / "results.json"
        model, original = loaded("folder/small", seed=1, num_hidden_layers=5), loaded("big")
        runs.append(evaluate(model, original, config(files), out=out, command="evaluate small", plan_hash="abc"))
        assert Results.load(out) == runs[-1]
    first, second = runs
    assert first.without_times() == second.without_times()
    logs = sorted((files / "one" / "items").rglob("*.jsonl"))
    assert len(logs) == 6
    for log in logs:
        assert log.read_bytes() == (files / "two" / log.relative_to(files / "one")).read_bytes()

    assert [(model.name, model.role) for model in first.models] == [("original", "original"), ("small", "model")]
    small, pair = first.model("small"), first.comparisons[0]
    assert small.size.num_layers == 5
    assert small.tasks[2].name == "continuation:prose"
    assert [task.name for task in small.tasks][:2] == ["quiz", "pairs"]
    assert all(task.num_items == 4 for task in small.tasks)
    assert pair.perplexity[0].ratio == pytest.approx(
        small.perplexity[0].perplexity / first.model("original").perplexity[0].perplexity, rel=1e-6
    )
    assert pair.divergence[0].kl_mean > 0
    assert [(one.task, one.sigma) for one in pair.stability[:2]] == [("quiz", "nll"), ("pairs", "nll")]
    assert len(pair.stability) == 6
    assert pair.stability_averages[0].name == "all"
    assert pair.speed.decode.ideal_ratio == pytest.approx(8 / 5)
    assert len(small.generation.continuations) == 12
    assert first.provenance.plan_hash == "abc"
    assert set(first.provenance.data_hashes) == {str(files / "prose.txt"), *(task.name for task in small.tasks)}

    again = stability(files / "one" / "items" / "original", files / "one" / "results.json", bootstrap=50)
    assert {one.task: one for one in again.stability} == {one.task: one for one in pair.stability}


def test_a_model_is_stable_against_itself(files):
    quick = config(files, speed=False, generation=False, tasks=(str(files / "wino.jsonl"),))
    pair = evaluate(loaded(), loaded(), quick).comparisons[0]
    assert all(one.stability == 1 and one.flips == 0 and one.mcnemar_p == 1 for one in pair.stability)
    assert pair.divergence[0].top1_agreement == 1
    assert pair.perplexity[0].nll_difference == 0


def test_one_model_alone_and_only_what_is_asked_for(files):
    found = evaluate(loaded(), config=EvaluationConfig(speed=False, generation=False))
    (model,) = found.models
    assert (model.name, model.role) == ("tiny", "model")
    assert model.perplexity == model.tasks == found.comparisons == ()
    assert model.generation is model.speed is None
    assert model.size.parameters > 0


def test_many_models_come_one_after_the_other(files):
    quick = config(files, speed=False, generation=False)
    alive = []

    def models():
        for seed in (1, 2):
            alive.append(seed)
            yield loaded("same-name", seed=seed)

    found = evaluate(models(), loaded(), quick)
    assert [model.name for model in found.models] == ["original", "same-name", "same-name-2"]
    assert [pair.model for pair in found.comparisons] == ["same-name", "same-name-2"]
    assert alive == [1, 2]


def test_held_out_windows_of_a_run(files):
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer.encode(prose(4000))[: 64 * 300], dtype=torch.int32).reshape(-1, 64)
    packed = Windows(ids, torch.zeros_like(ids), provenance={"bos": {"placed": "nowhere"}})
    quick = EvaluationConfig(tasks=("continuation",), limit=3, speed=False, generation=False)
    found = evaluate(loaded(), loaded(seed=1), quick, windows={"held-out": packed}).models[0]
    assert [text.name for text in found.perplexity] == ["held-out"]
    assert found.perplexity[0].num_tokens == 300 * 63
    assert found.tasks[0].name == "continuation"
    assert found.tasks[0].num_items == 3


def test_models_with_other_tokenizers_are_compared_by_answers_only(files):
    other = loaded("other", seed=1)
    other.tokenizer.add_tokens(["stone"])
    pair = evaluate(other, loaded(), config(files, speed=False, generation=False)).comparisons[0]
    assert pair.perplexity == pair.divergence == ()
    assert len(pair.stability) == 6


def test_without_divergence_the_same_perplexities(files):
    quick = config(files, speed=False, generation=False, tasks=())
    with_kl = evaluate(loaded(seed=1), loaded(), quick)
    without = evaluate(loaded(seed=1), loaded(), quick.model_copy(update={"divergence": False}))
    assert without.comparisons[0].divergence == ()
    for one, other in zip(with_kl.models, without.models, strict=True):
        assert one.perplexity[0].nll == pytest.approx(other.perplexity[0].nll, rel=1e-6)


def test_the_gate_tells_what_is_wrong(files):
    found = evaluate(loaded(seed=1), loaded(), EvaluationConfig(speed=False, max_new_tokens=40))
    bad = found.comparisons[0].model_copy(
        update={"generation": found.comparisons[0].generation.model_copy(update={"ok": False, "reasons": ("Loops.",)})}
    )
    assert gate_failures(found.model_copy(update={"comparisons": (bad,)})) == ("tiny: Loops.",)
    fine = evaluate(loaded(), loaded(), EvaluationConfig(speed=False, max_new_tokens=8))
    assert gate_failures(fine) == ()


def test_results_are_only_written_over_results(files):
    quick = EvaluationConfig(speed=False, generation=False, tasks=(str(files / "quiz.jsonl"),))
    out = files / "notes.json"
    out.write_text(json.dumps({"my": "notes"}))
    with pytest.raises(OutputError, match="no result file of ours"):
        evaluate(loaded(), config=quick, out=out)
    assert json.loads(out.read_text()) == {"my": "notes"}
    out = files / "new" / "results.json"
    evaluate(loaded(), config=quick, out=out)
    evaluate(loaded(), config=quick.model_copy(update={"tasks": (str(files / "wino.jsonl"),)}), out=out)
    assert [log.name for log in (files / "new" / "items").rglob("*.jsonl")] == ["wino.jsonl"]
    with pytest.raises(OutputError, match="is a folder"):
        evaluate(loaded(), config=quick, out=files)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"perplexity": ("nowhere.txt",)}, TextError, "nowhere.txt"),
        ({"perplexity": ("builtin", "builtin")}, ConfigError, "asked for twice"),
        ({"perplexity": ("hub:some/set",), "tokens": None}, ConfigError, "how many tokens"),
        ({"context": 1000}, ConfigError, "1000 tokens is longer than the model's 512 positions"),
        ({"tasks": ("nowhere.jsonl",)}, TaskError, "cannot read the task file"),
        ({"tasks": ("continuation:nowhere.txt",)}, TextError, "nowhere.txt"),
        ({"tasks": (__file__,)}, TaskError, "is no multiple-choice file"),
        ({"speed": True, "speed_prompt_tokens": 600}, StreamlineError, "602 positions"),
    ],
)
def test_impossible_requests_are_refused(files, changes, error, message):
    settings = config(files, tasks=(), generation=False, speed=False).model_copy(update=changes)
    with pytest.raises(error, match=message):
        evaluate(loaded(), config=settings)
    if "positions" not in message:
        with pytest.raises(error, match=message):
            check_config(settings)


def test_a_broken_model_is_named_before_the_slow_work(files):
    broken = loaded("broken")
    broken.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericsError, match="broken: a text of 5 tokens"):
        evaluate(broken, loaded(), config(files))


def test_result_files_that_are_none(tmp_path):
    file = tmp_path / "results.json"
    with pytest.raises(StreamlineError, match="cannot read"):
        Results.load(file)
    file.write_text("{")
    with pytest.raises(StreamlineError, match="no result file"):
        Results.load(file)
    file.write_text(json.dumps({"version": 99}))
    with pytest.raises(StreamlineError, match=r"version 1 \(it says 99\)"):
        Results.load(file)
    file.write_text(json.dumps({"version": 1, "models": [], "provenance": {}}))
    with pytest.raises(StreamlineError, match="versions' is missing"):
        Results.load(file)


def test_builtin_text_is_read_only_as_far_as_needed(files, monkeypatch):
    read = []

    class Endless:
        def documents(self):
            for number in range(10**9):
                read.append(number)
                yield type("Document", (), {"text": prose(100, number)})

    monkeypatch.setattr("llm_streamline.evaluation.material.open_text", lambda spec: Endless())
    quick = EvaluationConfig(perplexity=("builtin",), tokens=100, speed=False, generation=False)
    assert evaluate(loaded(), config=quick).models[0].perplexity[0].num_tokens == 99
    assert len(read) < 20


def test_settings_and_schema_need_no_torch():
    names = "llm_streamline.evaluation.config, llm_streamline.evaluation.result"
    code = f"import sys, {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_field_of_the_schema_is_documented():
    for name, record in Results.model_json_schema()["$defs"].items():
        assert record["description"], name
        for field, told in record["properties"].items():
            assert told.get("description"), f"{name}.{field}"
    assert all(told.get("description") for told in Results.model_json_schema()["properties"].values())
