"""The command line: what it prints where, what it refuses, and that it answers at once."""

import json
import subprocess
import sys

import pytest
from folders import edit_json, tiny_folder
from plans import facts
from scarcity import no_memory

from llm_streamline import cli
from llm_streamline.cli import main
from llm_streamline.cli.options import RECIPE_OPTIONS
from llm_streamline.methods.registry import method_names
from llm_streamline.plan import Plan, Remove, Replace

COMMANDS = [
    "compress",
    "analyze",
    "plan",
    "apply",
    "train",
    "evaluate",
    "stability",
    "report",
    "methods",
    "demo",
    "simulate",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=6)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Document {i} tells a short story about number {i * i}." * 3 for i in range(200)))
    return path


def call(monkeypatch, capfd, *arguments):
    """Exit code, stdout and stderr of one call in this process."""
    monkeypatch.setattr(sys, "argv", ["llm-streamline", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def refused(monkeypatch, capfd, *arguments, code=2):
    """The one sentence with which a call is refused."""
    found, out, err = call(monkeypatch, capfd, *arguments)
    assert found == code, err
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "Error: " in line]
    assert len(lines) == 1, err
    assert err.strip().endswith(lines[0])
    return lines[0]


# --- at once


def test_help_needs_no_torch():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llm_streamline.cli", "compress", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "transformers", "datasets", "numpy")}
    assert "--sparsity" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(monkeypatch, capfd, command):
    code, out, _ = call(monkeypatch, capfd, command, "--help")
    assert code == 0
    assert "Usage" in out


def test_the_options_of_the_issue_are_there():
    import typer.main

    commands = typer.main.get_command(cli.app).commands
    options = {option for parameter in commands["compress"].params for option in parameter.opts}
    wanted = (
        "-o --layers --sparsity --params --memory --kv-cache --latency --recipe --text --calibration-tokens "
        "--train-tokens --seq-len --replacement "
        "--objective --span --verify --seed --device --dtype --fresh --json"
    )
    assert set(wanted.split()) <= options
    assert set(COMMANDS) <= set(commands)
    given = {option for p in commands["evaluate"].params for option in p.opts}
    assert {"--against", "--perplexity", "--context", "--tokens", "--tasks", "--limit", "-o"} <= given


def test_every_recipe_option_has_its_key():
    from llm_streamline.cli.options import overrides
    from llm_streamline.config import load_recipe

    values = {
        "layers": 3,
        "span": "1:2",
        "text": ["builtin"],
        "params": None,
        "sparsity": None,
        "memory": None,
        "kv_cache": None,
        "latency": None,
        "replacement": "none",
    }
    values |= dict.fromkeys(("memory", "kv_cache", "latency"))
    values |= {"count": "net", "method": "shortgpt", "verify": 1, "calibration_tokens": "1k", "train_tokens": "0"}
    values |= {"seq_len": 8, "objective": "lm", "trainable": "norms", "seed": 1, "device": "cpu", "dtype": "float32"}
    values |= {"max_memory": "4GiB", "cache_states": "states"}
    assert values.keys() == RECIPE_OPTIONS
    recipe = load_recipe(None, overrides(**values))
    assert (recipe.selection.method, recipe.training.tokens, recipe.text.seq_len) == ("shortgpt", 0, 8)


def test_version_and_methods(monkeypatch, capfd):
    code, out, _ = call(monkeypatch, capfd, "--version")
    assert (code, out.split()[0]) == (0, "llm-streamline")
    code, out, err = call(monkeypatch, capfd, "methods", "--json")
    assert [method["name"] for method in json.loads(out)] == method_names()
    assert err == ""
    assert "\nshortgpt" in call(monkeypatch, capfd, "methods")[1]


def test_no_command_and_an_unknown_one_are_usage_errors(monkeypatch, capfd):
    assert call(monkeypatch, capfd, "compres")[0] == 2
    assert call(monkeypatch, capfd, "compress")[0] == 2
    assert call(monkeypatch, capfd, "compress", "x", "-o", "y", "--layers", "many")[0] == 2


# --- refusals: one sentence, exit code 2, nothing written


SMALL = ["--seq-len", 32, "--calibration-tokens", 64, "--train-tokens", 64]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layers", 0], "nothing would be removed"),
        (["--layers", 6], "at most 5 layers"),
        (["--layers", 60], "at most 5 layers"),
        (["--sparsity", 0], "between 0 and 1 exclusive, got 0.0"),
        (["--sparsity", 1], "between 0 and 1 exclusive, got 1.0"),
        (["--sparsity", -0.5], "between 0 and 1 exclusive"),
        (["--sparsity", 0.99], "layers to leave, but the model has only 6"),
        (["--params", "1T"], "nothing would be removed"),
        (["--params", "lots"], "'lots' is no count"),
        (["--layers", 2, "--sparsity", 0.2], "layers and sparsity are both given"),
        (["--memory", "1GiB", "--kv-cache", "1KiB"], "memory and kv_cache are both given"),
        (["--memory", "some"], "'some' is no number of bytes"),
        (["--memory", "9GiB"], "nothing would be removed"),
        (["--memory", 100], "at most 5 layers can go, which leaves 42,688 bytes"),
        (["--kv-cache", "1TiB@4k"], "of KV cache at 4,000 tokens) is no smaller than the model's"),
        (["--kv-cache", 1], "at most 5 layers can go, which leaves 64 bytes"),
        (["--kv-cache", "1KiB@0"], "at least 1 token"),
        (["--latency", "2x"], "between 0 and 1 exclusive, got 2.0"),
        (["--latency", "fast"], "'fast' is no ratio"),
        (["--method", "streamlin"], "no method 'streamlin'. Did you mean 'streamline'?"),
        (["--replacement", "lstm"], "replacement.kind"),
        (["--objective", "mes"], "Did you mean 'mse'?"),
        (["--trainable", "all"], "training.trainable"),
        (["--trainable", "norms", "--replacement", "none", "--objective", "mse"], "use hidden"),
        (["--dtype", "int8"], "dtype"),
        (["--device", "tpu"], "tpu"),
        (["--span", "4:9"], "runs past the last layer (the model has layers 0-5)"),
        (["--span", "4"], "a span is written START:STOP"),
        (["--span", "3:3"], "is empty"),
        (["--span", "3:4"], "does not make a smaller model"),
        (["--span", "0:4", "--replacement", "linear"], "no layer is before the span 0:4; begin it at layer 1 or later"),
        (["--seq-len", 1000], "longer than the model's 256 positions"),
        (["--seq-len", 1], "seq_len"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--count", "gross"], "target.count"),
        (["--recipe", "none.yaml"], "no recipe at none.yaml"),
        (["--replacement", "swiglu", "--method", "shortgpt"], "puts nothing in their place"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_and_nothing_is_written(monkeypatch, capfd, tmp_path, folder, text, options, sentence):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    known = [] if "--text" in options else ["--text", text]
    small = [] if "--seq-len" in options else SMALL
    message = refused(monkeypatch, capfd, "-q", "compress", folder, "-o", out, *known, *small, *options)
    assert sentence in message
    assert not out.exists()


def test_text_that_cannot_be_used_is_refused_and_nothing_is_written(monkeypatch, capfd, tmp_path, folder):
    out = tmp_path / "out"
    bad = {
        "empty.txt": b"",
        "binary.txt": b"\x00\x01\x02" * 50,
        "latin.txt": "café".encode("latin-1"),
        "short.txt": b"Hi.",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        message = refused(monkeypatch, capfd, "-q", "compress", folder, "-o", out, "--text", tmp_path / name, *SMALL)
        assert message.startswith("TextError: "), message
        assert not out.exists(), name
        message = refused(monkeypatch, capfd, "-q", "analyze", folder, "-o", out, "--text", tmp_path / name, *SMALL[:4])
        assert not out.exists(), name


def test_an_unknown_recipe_key_is_refused(monkeypatch, capfd, tmp_path, folder):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("training:\n  learningrate: 3\n")
    message = refused(monkeypatch, capfd, "compress", folder, "-o", tmp_path / "out", "--recipe", recipe)
    assert "unknown key 'training.learningrate'. Did you mean 'learning_rate'?" in message
    assert not (tmp_path / "out").exists()


def test_models_that_are_none_are_refused(monkeypatch, capfd, tmp_path, folder):
    out = tmp_path / "out"
    assert "SourceError" in refused(monkeypatch, capfd, "compress", tmp_path / "nowhere", "-o", out)
    encoder = tiny_folder(tmp_path / "encoder")
    edit_json(encoder / "config.json", model_type="bert", architectures=["BertForMaskedLM"])
    assert "encoder-only" in refused(monkeypatch, capfd, "analyze", encoder, "-o", out)
    edit_json(encoder / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "encoder-decoder" in refused(monkeypatch, capfd, "plan", encoder, "-o", tmp_path / "p.json")
    edit_json(encoder / "config.json", model_type="starship", architectures=["StarshipForCausalLM"])
    assert "unknown model_type 'starship'" in refused(monkeypatch, capfd, "compress", encoder, "-o", out)
    assert not out.exists()
    assert not (tmp_path / "p.json").exists()


def test_a_folder_that_is_not_ours_is_left_alone(monkeypatch, capfd, tmp_path, folder, text):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for command in (["compress", folder, "-o", out], ["analyze", folder, "-o", out]):
        message = refused(monkeypatch, capfd, *command, "--text", text, *SMALL[:4])
        assert "not made by llm-streamline" in message
    assert "is the model that is read" in refused(monkeypatch, capfd, "compress", folder, "-o", folder, *SMALL)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_plans_that_do_not_fit_are_refused(monkeypatch, capfd, tmp_path, folder):
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    assert "no plan file at" in refused(monkeypatch, capfd, "apply", plan, folder, "-o", out)
    plan.write_text("{")
    assert "cannot be read as a plan" in refused(monkeypatch, capfd, "apply", plan, folder, "-o", out)
    plan.write_text(Plan(model=facts(12), edits=(Remove(start=1, stop=3),)).to_json())
    message = refused(monkeypatch, capfd, "apply", plan, folder, "-o", out)
    assert "this plan was made for 'tiny' (num_layers 12)" in message
    assert "nothing to train" in refused(monkeypatch, capfd, "train", plan, folder, "-o", out)
    edits = (Replace(start=1, stop=3, network={"kind": "layer"}, templates=(1,)),)
    plan.write_text(Plan(model=facts(6, hidden_size=16), edits=edits).to_json())
    assert "(fingerprint" in refused(monkeypatch, capfd, "train", plan, folder, "-o", out, "--seq-len", 32)
    assert not out.exists()


def test_a_plan_never_overwrites_what_is_no_plan(monkeypatch, capfd, tmp_path, folder, text):
    precious = tmp_path / "precious.json"
    precious.write_text('{"mine": 1}')
    refused(monkeypatch, capfd, "plan", folder, "-o", precious, "--text", text, *SMALL)
    assert "is a folder" in refused(monkeypatch, capfd, "plan", folder, "-o", tmp_path, "--text", text, *SMALL)
    assert precious.read_text() == '{"mine": 1}'


def test_statistics_that_are_missing_are_refused(monkeypatch, capfd, tmp_path, folder, text):
    message = refused(
        monkeypatch, capfd, "plan", folder, "--stats", tmp_path, "-o", tmp_path / "p", "--text", text, *SMALL
    )
    assert "no statistics in" in message


def test_a_report_of_nothing_is_refused(monkeypatch, capfd, tmp_path):
    refused(monkeypatch, capfd, "report", tmp_path / "none")


def test_a_layer_that_is_not_finite_is_named(monkeypatch, capfd, tmp_path, text):
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path / "model", num_hidden_layers=6)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    message = refused(monkeypatch, capfd, "-q", "analyze", folder, "-o", out, "--text", text, *SMALL[:4])
    assert "the output of layer 3 is not finite" in message
    assert not (out / "streamline" / "stats.json").exists()


def test_our_own_mistakes_keep_their_traceback(monkeypatch, capfd):
    monkeypatch.setattr("llm_streamline.methods.registry.method_names", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, capfd, "methods")


@pytest.mark.parametrize("problem", [no_memory(), MemoryError()])
def test_memory_that_ends_anywhere_is_one_sentence(monkeypatch, capfd, problem):
    def fail():
        raise problem

    monkeypatch.setattr("llm_streamline.methods.registry.method_names", fail)
    message = refused(monkeypatch, capfd, "methods")
    assert message.startswith("OutOfMemoryError: out of memory (")
    assert "--max-memory auto" in message


def test_quiet_and_verbose_stand_anywhere(monkeypatch, capfd):
    for arguments in (["-q", "methods"], ["methods", "-q"], ["methods", "-vv"], ["methods", "--json", "--quiet"]):
        assert call(monkeypatch, capfd, *arguments)[0] == 0


def test_a_stop_by_the_keyboard_says_how_to_go_on(monkeypatch, capfd):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_streamline.methods.registry.method_names", stop)
    code, _, err = call(monkeypatch, capfd, "methods")
    assert code == 130
    assert "Traceback" not in err
