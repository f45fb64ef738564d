"""The command `evaluate` from its words to its exit code, on tiny models in folders."""

import json
import re

import pytest
import typer.main
from folders import byte_tokenizer
from samples import prose, questions, tiny, write_rows

from llm_streamline import cli
from llm_streamline.cli import main
from llm_streamline.evaluation.config import EvaluationConfig
from llm_streamline.evaluation.result import Results

QUICK = ("--no-speed", "--no-generation")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed, norm in (("original", 0, 1.0), ("small", 1, 1.0), ("mute", 0, 0.0), ("broken", 0, float("nan"))):
        model = tiny(seed=seed)
        model.model.norm.weight.data *= norm  # of 0: every token is as likely, and the first is written for ever
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "quiz.jsonl", questions())
    (folder / "text.txt").write_text(prose(400))
    return folder


@pytest.fixture
def run(monkeypatch, capfd, place, tmp_path):
    def call(*words):
        """Exit code, stdout and stderr; results go to `results.json` in the test's folder."""
        monkeypatch.chdir(place)
        out = ("-o", tmp_path / "results.json") if words[0] == "evaluate" else ()
        monkeypatch.setattr("sys.argv", ["llm-streamline", "-q", *map(str, (*words, *out))])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
        told = capfd.readouterr()
        return code, told.out, told.err

    return call


def test_every_setting_is_an_option():
    command = typer.main.get_command(cli.app).commands["evaluate"]
    assert set(EvaluationConfig.model_fields) <= {parameter.name for parameter in command.params}


def test_options_reach_the_record(run, tmp_path):
    words = ("--perplexity", "text.txt", "--context", 32, "--stride", 16, "--tokens", 64, "--sigma", "nll")
    words += ("--tasks", "quiz.jsonl", "--scorer", "light", "--bootstrap", 0, "--no-divergence", "--prompt", "One")
    words += ("--prompt", "Two", "--samples", 0, "--max-new-tokens", 3, "--speed-batch-size", 2, "--speed-rounds", 1)
    words += ("--speed-prompt-tokens", 5, "--speed-new-tokens", 2)
    code, _, err = run("evaluate", "small", "--against", "original", *words)
    assert (code, err) == (0, "")
    found = Results.load(tmp_path / "results.json")
    model, pair = found.model("small"), found.comparisons[0]
    assert (model.perplexity[0].context, model.perplexity[0].stride) == (32, 16)
    assert pair.divergence == ()
    assert [(one.sigma, one.stability_interval) for one in pair.stability] == [("nll", None)]
    assert [(text.prompt, text.mode) for text in model.generation.continuations] == [
        ("One", "greedy"),
        ("Two", "greedy"),
    ]
    speed = model.speed
    assert (speed.batch_size, speed.prompt_tokens, speed.new_tokens, speed.rounds) == (2, 5, 2, 1)
    assert found.provenance.command.startswith("llm-streamline -q evaluate small")


def test_the_gate_is_the_exit_code(run):
    words = ("--gate", "--no-speed", "--samples", 0, "--max-new-tokens", 24)
    code, out, err = run("evaluate", "mute", "--against", "original", *words)
    assert code == 1
    assert "gate: mute: " in err
    assert "empty" in err
    assert "results.json" in out  # the record is written all the same
    assert run("evaluate", "mute", "--against", "original", *words[1:])[0] == 0  # not asked for, not judged
    assert run("evaluate", "original", "--against", "original", *words)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("small", "--gate", "--no-speed"), "ConfigError: the gate judges .* name the original"),
        (("small", "--against", "original", "--gate", *QUICK), "ConfigError: the gate .* without the generation check"),
        (("broken", "--against", "original", *QUICK), "NumericsError: broken: .* not-a-number"),
        (("small", "--against", "broken", *QUICK), "NumericsError: broken: .* not-a-number"),
        (("small", "--scorer", "heavy", *QUICK), "ConfigError: options: scorer: .* 'heavy'"),
        (("small", "--tasks", "none.jsonl", *QUICK), "TaskError: cannot read the task file"),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_code_2(run, tmp_path, words, message):
    code, out, err = run("evaluate", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert re.search(message, err)
    assert not (tmp_path / "results.json").exists()


def test_an_unknown_rule_for_answers_is_refused(run, place, tmp_path):
    assert run("evaluate", "small", "--tasks", "quiz.jsonl", *QUICK)[0] == 0
    logs = tmp_path / "items" / "small"
    code, _, err = run("stability", logs, logs, "--metric", "f1")
    assert (code, err) == (2, "TaskError: no metric 'f1': answers are chosen by acc or acc_norm.\n")
    code, out, _ = run("stability", logs, logs, "--metric", "acc_norm", "--json")
    assert code == 0
    assert {one["metric"] for one in json.loads(out)["stability"]} == {"acc_norm"}
