"""The order of trainings, and the trainings that iterations add."""

from itertools import pairwise
from typing import Any

import pytest

from cpo_pipe.recipe.load import parse_recipe
from tests.support.recipes import CPO, MLE, content, evaluation, refusal


def order(**train: dict[str, Any]) -> list[str]:
    return parse_recipe(content(train=train), "r").training_order()


def test_each_training_comes_after_those_it_needs() -> None:
    assert order(b={**MLE, "init": "a"}, a=MLE) == ["a", "b"]
    # `last` takes neither init nor reference from `base`, but `base` generates its negatives.
    last = {"init": "folder", "objective": "cpo", "reference": "folder"}
    assert order(last=last, base=MLE) == ["base", "last"]
    assert order(last=MLE, base=MLE) == ["last", "base"]  # no dependencies: as written


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"a": {**MLE, "init": "a"}}, "train has a cycle: a needs a"),
        ({"a": {**MLE, "init": "b"}, "b": {**MLE, "init": "a"}}, " needs "),
        # The generator of the negatives is the model that is trained on them.
        ({"base": {"init": "folder", "objective": "cpo", "reference": "folder"}}, "train has a cycle: base needs base"),
    ],
)
def test_a_cycle_is_refused(train: dict[str, Any], message: str) -> None:
    explained = refusal(train=train)
    assert explained.startswith("train has a cycle: ")
    assert message in explained


def test_a_cycle_is_listed_in_dependency_order() -> None:
    train = {"a": {**MLE, "init": "b"}, "b": {**MLE, "init": "c"}, "c": {**MLE, "init": "a"}}
    chain = refusal(train=train).removeprefix("train has a cycle: ").split(" needs ")
    assert len(chain) == 4
    assert all(train[name]["init"] == needed for name, needed in pairwise(chain))


RANKED = {"init": {"architecture": "gpt2"}, "objective": "cpo-ranked", "reference": "base"}


SLIC = {"init": "base", "objective": "slic"}


def test_an_iteration_starts_from_the_previous_one() -> None:
    recipe = parse_recipe(
        content(train={"base": MLE, "cpo": {**CPO, "learning_rate": 0.5}, "slic": SLIC}, iterations=3), "r"
    )
    trainings = recipe.trainings()
    assert list(trainings) == ["base", "cpo", "slic", "cpo@2", "slic@2", "cpo@3", "slic@3"]
    assert {name: trainings[name] for name in recipe.train} == recipe.train
    starts = {
        name: (training.init, getattr(training, "reference", None))
        for name, training in trainings.items()
        if "@" in name
    }
    assert starts == {
        "cpo@2": ("cpo", "cpo"), "cpo@3": ("cpo@2", "cpo@2"), "slic@2": ("slic", None), "slic@3": ("slic@2", None)
    }  # fmt: skip
    assert trainings["cpo@3"] == recipe.train["cpo"].model_copy(update={"init": "cpo@2", "reference": "cpo@2"})


def test_only_the_generator_of_negatives_changes_between_iterations() -> None:
    sources: dict[str, dict[str, Any]] = {
        "autoregressive": {"model": "base", "count": 3, "top_k": 7},
        "other": {"strategy": "meanfield", "model": "base"},
        "truncation": {},
        "old": {"strategy": "pool", "model": "base", "strength": 1},
    }
    negatives = {"seed": 5, "sources": sources}
    recipe = parse_recipe(
        content(train={"base": MLE, "cpo": CPO, "ranked": RANKED}, negatives=negatives, iterations=3), "r"
    )
    assert recipe.negatives is not None
    assert recipe.negatives_of("cpo") == recipe.negatives_of("ranked") == recipe.negatives
    for name, generator in {"cpo@2": "cpo", "cpo@3": "cpo@2", "ranked@2": "ranked", "ranked@3": "ranked@2"}.items():
        changed = {source: {**sources[source], "model": generator} for source in ("autoregressive", "other")}
        expected = content(train={"base": MLE}, negatives={**negatives, "sources": {**sources, **changed}})
        assert recipe.negatives_of(name) == parse_recipe(expected, "r").negatives


def test_iterations_run_in_order_and_other_trainings_may_start_from_any() -> None:
    train = {"last": {**MLE, "init": "cpo@3"}, "cpo": CPO, "base": MLE, "side": {**CPO, "init": "cpo@2"}}
    order = parse_recipe(content(train=train, iterations=3), "r").training_order()
    assert sorted(order) == sorted(["last", "cpo", "base", "side", "cpo@2", "cpo@3", "side@2", "side@3"])
    for before, after in [("base", "cpo"), ("cpo", "cpo@2"), ("cpo@2", "cpo@3"), ("cpo@3", "last"), ("cpo@2", "side"),
                          ("side", "side@2"), ("side@2", "side@3")]:  # fmt: skip
        assert order.index(before) < order.index(after)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"iterations": 0}, "iterations is 0: input should be greater than 0"),
        (
            {"iterations": 2, "train": {"base": MLE}},
            "iterations is 2, but no training learns from negatives; remove it",
        ),
        # Names with an @ are reserved for iterations (and, among systems, for ensembles).
        ({"iterations": 2, "train": {"base": MLE, "cpo": CPO, "cpo@2": MLE}}, "train.cpo@2 is 'cpo@2': string should"),
        ({"iterations": 2, "apis": {"cpo@2": {"url": "http://x/v1", "model": "m"}}}, "apis.cpo@2 is 'cpo@2': string"),
        ({"iterations": 2, **evaluation(systems={"base": {"model": "cpo@3"}})},
         "evaluate.systems.base names cpo@3, but iterations is 2; choose from cpo, cpo@2, or "
         "raise iterations"),
        ({"train": {"base": {**MLE, "init": "cpo@2"}, "cpo": CPO}}, "train.base names cpo@2, but iterations is 1"),
        ({"iterations": 2, **evaluation(ensembles={"mix": {"of": ["base@2", "cpo"], "alphas": [0.5]}})},
         "evaluate.ensembles.mix names base@2, but iterations is 2; choose from base, or"),
        ({"iterations": 2, "negatives": {"sources": {"autoregressive": {"model": "cpo@1"}}}},
         "negatives.sources.autoregressive names cpo@1, but iterations is 2"),
        # The negatives of the first iteration would come from the second.
        ({"iterations": 2, "negatives": {"sources": {"autoregressive": {"model": "cpo@2"}}}}, "train has a cycle: "),
    ],
)  # fmt: skip
def test_references_to_missing_iterations_are_refused(sections: dict[str, Any], message: str) -> None:
    assert refusal(**sections).startswith(message)


def test_every_model_field_accepts_an_iteration() -> None:
    judges = {"likelihood": {"model": "cpo@2"}}
    systems = {"base": {"model": "cpo@2"}, "both": {"merge": {"cpo": 0.5, "cpo@2": 0.5}}}
    ensembles = {"cpo": {"of": ["cpo@2", "base"], "alphas": [0, 1]}}
    sections = evaluation(systems=systems, ensembles=ensembles, judges=judges, mauve_model="cpo@2")
    recipe = parse_recipe(content(iterations=2, **sections), "r")
    assert recipe.evaluate is not None
    of_ensembles = {name for name in recipe.evaluate.all_systems() if "@" in name}
    assert of_ensembles == {"cpo@0", "cpo@1"}
    assert not of_ensembles & recipe.trainings().keys(), "an α is at most 1, a later iteration at least 2"
