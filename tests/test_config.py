import pytest
import yaml

from llm_streamline.config import DEMO, Recipe, Target, TrainingConfig, load_recipe, parse_count
from llm_streamline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("256k", 256_000),
        ("5.4B", 5_400_000_000),
        ("1e6", 1_000_000),
        ("32_768", 32_768),
        ("1,024", 1024),
        (7, 7),
        ("2M", 2 * 10**6),
    ],
)
def test_counts_are_read_with_units(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "k", "many", "5 apples", "nan", "inf", "-", float("inf"), float("nan"), [1], None]
)
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match="is no count; write for example"):
        parse_count(text)


def refusal(data=None, tmp_path=None, **options):
    path = None
    if data is not None:
        path = tmp_path / "recipe.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_is_a_recipe():
    assert load_recipe(None) == Recipe()


def test_an_empty_file_is_the_default_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("", encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml") == Recipe()


def test_the_saved_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe(None, {"target.layers": 9, "selection.span": "3:5", "training.objective": "kl=1,mse=0.1"})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_every_default_is_written_out():
    saved = yaml.safe_load(Recipe().to_yaml())
    for name, field in Recipe.model_fields.items():
        assert name in saved
        for key in getattr(field.annotation, "model_fields", {}):
            assert key in saved[name]


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("seed: 3\ntext: {seq_len: 64, sources: [builtin]}\n", encoding="utf-8")
    recipe = load_recipe(path, {"seed": 5, "text.sources": ["a.txt"], "dtype": None})
    assert (recipe.seed, recipe.text.seq_len, recipe.text.sources) == (5, 64, ("a.txt",))


def test_a_target_on_the_command_line_replaces_the_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("target: {layers: 9, count: removed}\n", encoding="utf-8")
    assert load_recipe(path, {"target.sparsity": 0.3}).target == Target(sparsity=0.3, count="removed")


def test_the_demo_settings_fit_the_recipe():
    assert load_recipe(None, DEMO).target.layers == 6


@pytest.mark.parametrize(
    ("text", "weights"),
    [("mse", {"mse": 1.0}), ("kl=1,mse=0.1", {"kl": 1.0, "mse": 0.1}), (" lm , kl=2 ", {"lm": 1.0, "kl": 2.0})],
)
def test_objectives_are_read_as_weights(text, weights):
    assert TrainingConfig(objective=text).objective == weights


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target.layers": 0}, "layers must be at least 1, got 0: nothing would be removed"),
        ({"target.layers": -2}, "layers must be at least 1"),
        ({"target.sparsity": 0.0}, "between 0 and 1 exclusive, got 0.0"),
        ({"target.sparsity": 1.0}, "between 0 and 1 exclusive, got 1.0"),
        ({"target.sparsity": float("nan")}, "between 0 and 1 exclusive"),
        ({"target.params": "0"}, "params must be positive"),
        ({"target.params": "many"}, "'many' is no count"),
        ({"target.layers": 3, "target.sparsity": 0.2}, "layers and sparsity are both given"),
        ({"target.count": "gross"}, "target.count"),
        ({"selection.span": "5"}, "a span is written START:STOP"),
        ({"selection.span": "5:5"}, "is empty; STOP is the first layer that stays"),
        ({"selection.span": "-1:5"}, "a span is written START:STOP"),
        ({"selection.span": [1, 2, 3]}, "selection.span"),
        ({"selection.span": ["a", 2]}, "selection.span"),
        ({"selection.span": 5}, "selection.span"),
        ({"selection.verify": -1}, "selection.verify"),
        ({"replacement.kind": "rnn"}, "replacement.kind"),
        ({"replacement.kind": "ffn", "replacement.count": 2}, "count is for kind 'layer' only"),
        ({"replacement.kind": "ffn", "replacement.residual": False}, "has no best start"),
        ({"replacement.width": 8}, "width and activation are for kind 'ffn' only"),
        ({"replacement.ridge": 0}, "replacement.ridge"),
        ({"training.objective": "kll"}, "no objective 'kll'. Did you mean 'kl'?"),
        ({"training.objective": "kl=0"}, "training.objective"),
        ({"training.objective": "kl=x"}, "training.objective"),
        ({"training.objective": {}}, "no objective given"),
        ({"training.objective": 3}, "training.objective"),
        ({"training.warmup_ratio": 2}, "training.warmup_ratio"),
        ({"training.tokens": "-1"}, "training.tokens"),
        ({"training.tokens": [1]}, "is no count"),
        ({"dtype": "int8"}, "dtype"),
        ({"seed": -1}, "seed"),
        ({"text.seq_len": 0}, "text.seq_len"),
        ({"text.seq_len": 1}, "text.seq_len"),
        ({"text.sources": []}, "text.sources"),
        ({"training.learningrate": 1.0}, "Did you mean 'learning_rate'?"),
        ({"tranning": 1}, "Did you mean 'training'?"),
    ],
)
def test_every_bad_value_has_its_sentence(options, reason):
    message = refusal(**options)
    assert message.startswith("options: ")
    assert reason in message


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("data", ["a: [", "- 1\n- 2\n", "just text", "\t{"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, data):
    assert "recipe.yaml" in refusal(data, tmp_path)


@pytest.mark.parametrize("data", ["target: 5", "target: [1]", "target: layers"])
def test_a_section_that_is_no_mapping_is_refused(tmp_path, data):
    assert "target" in refusal(data, tmp_path)
    assert "target" in refusal(data, tmp_path, **{"target.layers": 3})
    assert "target" in refusal(data, tmp_path, **{"target.count": "net"})


def test_binary_is_no_recipe(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read as a recipe"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot be read as a recipe"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("key", ["a.b", "seed.x"])
def test_a_dotted_option_below_a_plain_value_is_refused(tmp_path, key):
    assert key.split(".")[0] in refusal("seed: 3", tmp_path, **{key: 1})
