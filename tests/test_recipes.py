"""Recipes are files people copy: each parses and says how to run it, and two must equal what the code does."""

from pathlib import Path

import pytest

from llm_streamline.config import DEMO, Recipe, load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def test_there_are_the_three_that_the_readme_promises():
    assert {"default.yaml", "demo.yaml", "streamline-paper.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_opens_with_how_to_run_it(path):
    load_recipe(path)
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("run:" in line for line in head)


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
