"""A recipe as text: it loads as the same recipe, in the short and in the full form."""

from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.recipe.load import builtin_recipes, load_recipe, parse_recipe
from cpo_pipe.recipe.render import WIDTH, recipe_text
from cpo_pipe.trainer.lora import Lora
from tests.support.recipes import DATA, MLE, content


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_built_in_recipe_survives_a_round_trip(name: str, full: bool, tmp_path: Path) -> None:
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


def test_the_full_form_shows_the_keys_of_sections_that_are_not_set(tmp_path: Path) -> None:
    """Uncommented, they are a section with the defaults."""
    text = recipe_text(load_recipe("pairs"), named=False)
    assert "    # lora: null  # or a section:\n    #   # rank of the adapters\n    #   r: 16\n" in text
    assert "\n#   NAME:\n#     # base URL of the server" in text, "apis"
    assert "\n    #   # easy groups first" not in text
    lines = text.replace("# lora: null  # or a section:", "lora:", 1).splitlines()
    first = lines.index("    lora:") + 1
    for at in range(first, first + 6):
        lines[at] = lines[at].replace("#   ", "  ", 1)
    assert "lora_alpha: 32" in " ".join(lines[first : first + 6])
    (tmp_path / "mine.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")).train["reference"].lora == Lora()


@pytest.mark.parametrize(
    "text",
    [
        "# no comment: not 'a key', \"nor\" {a: mapping} " + "and so on " * 20 + "end",
        "- no list " + "\N{GREEK SMALL LETTER BETA} = 5; " * 40 + "end",
        "two  spaces and a no-break\xa0space " + "word " * 40 + "end",
        " a space before " + "word " * 40,
        "a bell \x07 and a line\nbreak " + "word " * 40 + "end",
        "a-word-without-a-space-" * 20,
    ],
)
def test_long_texts_and_mappings_survive_a_round_trip(text: str, tmp_path: Path) -> None:
    scales = {
        "small": {"data.source": text, "train.*.max_steps": 3, "apis": {}, "rank": {"model": text, "batch_size": 2}}
    }
    recipe = parse_recipe(content(note=text, scales=scales), "r")
    (tmp_path / "r.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    again = load_recipe(str(tmp_path / "r.yaml"))
    assert again == recipe
    assert (again.note, again.scales) == (text, scales)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"data": {**DATA, "columns": {}}},
        {"data": {**DATA, "template": "Q: {prompt}\n\n# not a comment\n'A':\t"}},
        {"train": {}},
        {"train": {"1": MLE, "on": MLE, "1e3": MLE, "null": {**MLE, "init": "no"}}},
        {"rank": {"by": "none"}},
        {"rank": {"by": "embedding", "batch_size": 3}},
        {"rank": {}},
        {"iterations": 3},
        {"train": {"base": {**MLE, "learning_rate": 1e-5, "adam_epsilon": 1e-12}}},
        {"evaluate": {"systems": {"x": {"merge": {"b": 0.25, "1": 0.75}}}, "baseline": "x",
                      "judges": {"exact": {"pattern": "#(.)"}, "ours": {"kind": "longer"}}}},
        {"evaluate": {"systems": {"x": {"model": "b"}}, "baseline": "x", "judges": ["exact", "longer"]}},
        {"apis": {"gpt": {"url": "http://x/v1", "model": "m"}}, "evaluate": {
            "systems": {"x": {"model": "b"}}, "baseline": "x", "judges": {
            "openai": {"api": "gpt", "temperature": None}, "local": {"model": "b", "engine": "transformers"}}}},
    ],
)  # fmt: skip
def test_the_text_loads_as_the_same_recipe(tmp_path: Path, sections: dict[str, Any]) -> None:
    recipe = parse_recipe(content(**sections), "r")
    (tmp_path / "r.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    again = load_recipe(str(tmp_path / "r.yaml"))
    assert again == recipe
    assert again.model_dump(exclude_unset=True) == recipe.model_dump(exclude_unset=True)
    assert recipe_text(again) == recipe_text(recipe)


def test_a_text_with_line_breaks_is_written_on_one_line(tmp_path: Path) -> None:
    template = "Q: {prompt}\nA:\r\n\u2028é ' \\"
    init = {"architecture": "gpt2", "config": {"note": "a\nb"}}
    recipe = parse_recipe(content(data={**DATA, "template": template}, train={"base": {**MLE, "init": init}}), "r")
    lines = recipe_text(recipe).splitlines()
    assert r'''  template: "Q: {prompt}\nA:\r\n\Lé ' \\"''' in lines
    assert r'      config: {note: "a\nb"}' in lines
    (tmp_path / "r.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


def test_the_name_may_come_from_the_file_name(tmp_path: Path) -> None:
    recipe = parse_recipe(content(), "r")
    (tmp_path / "mine.yaml").write_text(recipe_text(recipe, named=False), encoding="utf-8")
    assert "\n# names the run's folder (default: the file's name)\n# name: r\n" in recipe_text(recipe, named=False)
    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe.model_copy(update={"name": "mine"})
    assert "\nname: mine\n" in recipe_text(load_recipe(str(tmp_path / "mine.yaml")))
