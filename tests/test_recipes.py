"""Recipes are files people copy: each parses and says how to run it, and two must equal what the code does."""

import re
from pathlib import Path

import pytest

from llm_streamline.config import DEMO, Recipe, load_recipe
from llm_streamline.methods.registry import find_method, method_names

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def test_there_are_the_three_that_the_readme_promises():
    assert {"default.yaml", "demo.yaml", "streamline-paper.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_opens_with_how_to_run_it(path):
    load_recipe(path)
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("run:" in line for line in head)


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_recipe_of_its_own_and_a_row_in_the_table_of_papers(name):
    own = {path.name for path in RECIPES if load_recipe(path).selection.method == name}
    table = (RECIPES[0].parent.parent / "docs" / "papers.md").read_text(encoding="utf-8")
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    _, _, paper, files, recipes, number, _ = (cell.strip() for cell in row.split("|"))
    assert find_method(name).paper.removeprefix("arXiv:") in paper
    assert f"`methods/{name}.py`" in files
    assert own & set(re.findall(r"`([\w-]+\.yaml)`", recipes))
    assert number


def test_the_default_recipe_is_what_an_empty_recipe_means():
    assert load_recipe(RECIPES[0].parent / "default.yaml") == Recipe()


def test_the_demo_recipe_is_what_the_demo_command_does():
    assert load_recipe(RECIPES[0].parent / "demo.yaml") == load_recipe(None, DEMO)


def test_the_paper_recipe_has_the_published_numbers():
    """Specification, section 3.3."""
    recipe = load_recipe(RECIPES[0].parent / "streamline-paper.yaml")
    training = recipe.training
    assert (training.learning_rate, training.min_learning_rate, training.weight_decay) == (2e-4, 5e-5, 1e-3)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
    assert training.tokens == 30_000 * 2048
    assert (training.max_grad_norm, training.adam_beta2, training.mse_weighting) == (5.0, 0.999, "uniform")
    assert recipe.calibration.tokens == 50 * 2048
    assert recipe.replacement.init == "first"
    assert recipe.selection.verify == 0


def published(name):
    recipe = load_recipe(RECIPES[0].parent / f"{name}.yaml")
    return recipe, recipe.replacement, recipe.training


def test_the_repairs_that_claim_the_authors_settings_have_them():
    """Specification "peers", sections 3 to 6, and "reassessing"."""
    recipe, patch, _ = published("ghosted-paper")
    assert (patch.kind, patch.init, patch.fit_weighting, patch.fit_tokens) == (
        "patch",
        "closed_form",
        "uniform",
        32 * 2048,
    )
    assert (patch.ridge, recipe.selection.options["candidates"]) == (1e-6, "mean")
    recipe, patch, _ = published("linear-patch")
    assert (patch.init, patch.fit_weighting, patch.fit_tokens) == ("hadamard", "uniform", 128 * 2048)
    recipe, linear, _ = published("replaceme")
    assert (linear.init, linear.fit_weighting, linear.fit_tokens) == ("closed_form", "uniform", 512 * 1024)
    assert (linear.fit_epochs, linear.fit_learning_rate) == (10, 1e-4)  # of the cosine form
    assert published("mean-update")[1].fit_weighting == "uniform"
    _, _, lora = published("heal-lora")
    assert (lora.trainable, lora.heal.rank, lora.heal.alpha, lora.heal.targets) == ("lora", 8, 16, ())
    assert lora.heal.learning_rate == 1e-4
    recipe, _, tail = published("heal-last-layers")
    assert (recipe.selection.method, recipe.selection.options) == ("reassessing", {"metric": "tail"})
    assert (tail.trainable, tail.heal.last_layers, tail.objective) == ("head", 3, {"lm": 1.0})
    protected = published("shortened-llama")[0].selection.options
    assert (protected["protect_first"], protected["protect_last"]) == (4, 2)
