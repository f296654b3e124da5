"""`init`: the text of a built-in recipe."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cpo_pipe.recipe.load import builtin_recipes, load_recipe


@pytest.mark.parametrize("name", builtin_recipes())
def test_init_prints_what_the_recipe_sets(cli: Callable, tmp_path: Path, name: str) -> None:
    text = cli("init", name).out
    assert text.startswith(f"# {name}.yaml: run it with `cpo-pipe run FILE`; `cpo-pipe init {name} --full` prints")
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "my.yaml")) == load_recipe(name).model_copy(update={"name": "my"})


@pytest.mark.parametrize("name", builtin_recipes())
def test_init_full_prints_the_recipe_with_a_comment_on_every_key(cli: Callable, tmp_path: Path, name: str) -> None:
    text = cli("init", name, "--full").out
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "my.yaml")) == load_recipe(name).model_copy(update={"name": "my"})

    assert max(map(len, text.splitlines())) < 400
    lines = re.sub(r"^(note: >-\n)(?:  .*\n)+", r"\1", text, flags=re.MULTILINE).splitlines()
    named = {
        "train",
        "systems",
        "decodings",
        "judges",
        "apis",
        "ensembles",
        "sources",
    }  # the keys below these are the user's own names
    path: list[str] = []
    keys = 0
    for before, line in zip(["", *lines], lines, strict=False):
        match = re.match(r"( *)(# )?([\w-]+):( |$)", line)
        if not match or (match[2] and not before.lstrip().startswith("#")):
            continue
        is_default = match[2] is not None
        if not is_default:
            path[len(match[1]) // 2 :] = [match[3]]
            below = {"scales", "config"} & {*path[:-1]}  # their content is not keys of a recipe
            if len(path) > 1 and (below or (path[-2] in named and len(path) in (2, 3))):
                continue
        keys += 1
        assert before.strip().startswith("# "), f"{line!r} has no comment"
    assert keys > 60
