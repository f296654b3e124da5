"""A recipe as text: the short and the full form of every built-in recipe load as the same recipe."""

from pathlib import Path

import pytest

from cpo_pipe.recipe.load import builtin_recipes, load_recipe
from cpo_pipe.recipe.render import WIDTH, recipe_text


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_built_in_recipe_comes_back_as_it_was(name: str, full: bool, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / f"{name}.yaml").write_text(recipe_text(recipe, named=False, full=full), encoding="utf-8")
    assert load_recipe(str(tmp_path / f"{name}.yaml")) == recipe


def test_the_short_form_has_the_keys_that_are_set_and_fits_a_screen() -> None:
    lines = recipe_text(load_recipe("pairs"), named=False, full=False).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= WIDTH
    assert "  max_prompt_tokens: 512  # longest prompt, in tokens" in lines
    assert "  mle: {init: reference, objective: mle, max_steps: 1000}" in lines
    assert not any("learning_rate" in line for line in lines), "a default"
