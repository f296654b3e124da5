"""`init`: the text of a built-in recipe."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from cpo_pipe.recipe.load import builtin_recipes, load_recipe
from cpo_pipe.recipe.recipe import Recipe


@pytest.mark.parametrize("name", builtin_recipes())
def test_init_prints_what_the_recipe_sets(cli: Callable, tmp_path: Path, name: str) -> None:
    text = cli("init", name).out
    lines = text.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=cpo-pipe.schema.json"
    assert lines[2].startswith(f"# {name}.yaml: run it with `cpo-pipe run FILE`; `cpo-pipe init {name} --full` prints")
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


def test_init_without_a_name_lists_the_recipes(cli: Callable) -> None:
    listed = dict(line.split(maxsplit=1) for line in cli("init").out.splitlines())
    assert listed.keys() == builtin_recipes().keys()
    assert listed["demo"] == "The whole method in five minutes on two cores, without a download."
    assert max(map(len, cli("init").out.splitlines())) <= 100


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(Recipe.model_json_schema())


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_schema_takes_every_built_in_recipe(schema: jsonschema.Draft202012Validator, name: str) -> None:
    schema.validate(yaml.safe_load(builtin_recipes()[name].read_text()))


@pytest.mark.parametrize(
    ("wrong", "valid"),
    [
        ("train.mle.bach_size=3", "train.mle.batch_size=3"),
        ("train.mle.beta=3.0", "train.cpo-ranked.beta=3.0"),
        ("train.mle.objective=mel", "train.mle.objective=my.module:Thing"),
        ("data.chunk_token=3", "data.chunk_tokens=3"),
        ("evaluate.judges=[similar]", "evaluate.judges=[similarity]"),
        ("evaluate.judges={exact: {patern: x}}", "evaluate.judges={exact: {pattern: x}}"),
        ("rank={by: embeding}", "rank={by: embedding}"),
        ("nonsense=1", "note=1"),
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(
    schema: jsonschema.Draft202012Validator, wrong: str, valid: str
) -> None:
    for setting, taken in ((wrong, False), (valid, True)):
        content = yaml.safe_load(builtin_recipes()["demo"].read_text())
        path, _, value = setting.partition("=")
        *parents, last = path.split(".")
        node = content
        for parent in parents:
            node = node[parent]
        node[last] = str(value) if path == "note" else yaml.safe_load(value)
        assert schema.is_valid(content) == taken, setting


def test_schema_prints_it(cli: Callable) -> None:
    assert json.loads(cli("schema").out) == Recipe.model_json_schema()
