"""Judges in a recipe: the short list, and the settings that each kind accepts."""

from typing import Any

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.recipe.load import parse_recipe
from tests.support.recipes import API, SYSTEMS, content


def judging(judges: Any, **sections: Any) -> dict[str, Any]:
    evaluation = {"systems": SYSTEMS, "baseline": "base", "judges": judges}
    return content(evaluate=evaluation, apis={"mini": API}, **sections)


def test_a_list_is_short_for_judges_without_settings() -> None:
    short = parse_recipe(judging(["exact", "longer"]), "r").evaluate
    long = parse_recipe(judging({"exact": {}, "longer": {"kind": "longer"}}), "r").evaluate
    assert short is not None
    assert short == long
    assert {name: judge.kind for name, judge in short.judges.items()} == {"exact": "exact", "longer": "longer"}
    other = parse_recipe(judging({"exact": {"kind": "longer"}, "gpt": {"kind": "openai", "api": "mini"}}), "r").evaluate
    assert other is not None
    assert [judge.kind for judge in other.judges.values()] == ["longer", "openai"]
    gpt = other.judges["gpt"]
    assert (gpt.template, gpt.both_orders, gpt.max_tokens, gpt.temperature) == ("strict", True, 16, 0)
    (local,) = parse_recipe(judging({"local": {"model": "base"}}), "r").evaluate.judges.values()  # type: ignore[union-attr]
    assert (local.template, local.both_orders, local.engine) == ("strict", True, "auto")


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ({"mine": {}}, "evaluate.judges.mine: kind is missing; choose from exact, similarity, "),
        ({"similarty": {}}, "evaluate.judges.similarty: unknown judge 'similarty'; did you mean similarity?"),
        ({"mine": {"kind": "exakt"}}, "evaluate.judges.mine: unknown judge 'exakt'; did you mean exact?"),
        ([{"exact": {}}], "evaluate.judges: a list only names kinds; for settings give a mapping"),
        ({"longer": {"pattern": "(a)"}}, 'evaluate.judges.longer.pattern: not used by judge "longer" (but by exact)'),
        ({"exact": {"both_orders": False}},
         'evaluate.judges.exact.both_orders: not used by judge "exact" (but by openai, local); remove it'),
        ({"likelihood": {"model": "base", "engine": "vllm"}},
         'evaluate.judges.likelihood.engine: not used by judge "likelihood" ('),
        ({"local": {"model": "base", "temperature": None}},
         'evaluate.judges.local.temperature: not used by judge "local" (but by openai)'),
        ({"local": {"model": "base", "max_tokens": 9}},
         'evaluate.judges.local.max_tokens: not used by judge "local" (but by openai)'),
        ({"local": {"model": "base", "engine": "trt"}}, "evaluate.judges.local.engine: unknown engine 'trt'; choose"),
        ({"openai": {"api": "mini", "temperature": -1}}, "evaluate.judges.openai.temperature is -1: input should be "),
        ({"openai": {"api": "mini", "max_tokens": 0}}, "evaluate.judges.openai.max_tokens is 0: input should be "),
        ({"openai": {"api": "mini", "model": "base"}}, 'evaluate.judges.openai.model: not used by judge "openai" ('),
        ({"openai": {}}, "evaluate.judges.openai.api is missing"),
        ({"local": {}}, "evaluate.judges.local.model is missing"),
        ({"openai": {"api": "mimi"}}, "evaluate.judges.openai.api 'mimi' is not in `apis`; did you mean mini?"),
        ({"local": {"model": "mini"}}, "evaluate.judges.local names mini, which is an API and has no weig"),
        ({"openai": {"api": "mini", "template": "{prompt} {output_a}"}},
         "evaluate.judges.openai.template: '{prompt} {output_a}' is not dolly, wiki, strict or a text with {prompt}, "),
        ({"exact": {"pattern": "("}}, "evaluate.judges.exact.pattern: '(' is not a regular expression (missing ) at "),
        ({"exact": {"pattern": "####"}}, "evaluate.judges.exact.pattern: '####' has no group, and its first group is"),
        ({"exact": {"patern": "(a)"}}, "evaluate.judges.exact.patern is not a known key; did you mean pattern?"),
        ({"a b": {"kind": "exact"}}, "evaluate.judges.a b is 'a b': string should match pattern"),
    ],
)  # fmt: skip
def test_a_judge_only_accepts_the_settings_of_its_kind(judges: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(judging(judges), "r")
    assert str(caught.value).removeprefix("recipe r: ").startswith(message)
