"""The built-in recipes of the papers' tables: each runs at the scale `smoke`, in which only sizes are smaller."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.recipe import TrainedTokenizer, builtin_recipes, load_recipe
from tests.pipeline.api_server import Seen, serve, written
from tests.pipeline.conftest import Result

PAPERS = ["dolly-gpt2-xl", "dolly-openllama-3b", "dolly-decoding", "dolly-strategies", "pairs-curriculum",
          "wiki-openllama-3b"]  # fmt: skip

SIZES = {
    "name", "data.tokenizer", "data.max_rows", "data.test", "data.piece_tokens", "data.max_prompt_tokens",
    "data.max_target_tokens", "data.max_rejected", "negatives.max_examples", "negatives.max_new_tokens",
    "evaluate.examples", "evaluate.max_new_tokens", "evaluate.bootstrap", "evaluate.mauve_model",
}  # fmt: skip
"""What a scale may change, beside steps and batches of trainings and the model that the first one starts from."""


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value and path not in ("scales", "data.tokenizer"):
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


@pytest.mark.parametrize("name", PAPERS)
def test_a_scale_changes_sizes_and_nothing_else(name: str) -> None:
    whole, small = (dict(flat(load_recipe(name, scale=scale).model_dump())) for scale in (None, "smoke"))
    changed = {path for path in whole.keys() | small.keys() if whole.get(path) != small.get(path)}
    models = {path for path in changed if path.startswith("train.") and ".init" in path}
    counts = {path for path in changed if path.startswith("train.") and path.endswith((".steps", ".batch_size"))}
    assert changed - models - counts <= SIZES
    assert len({path.split(".")[1] for path in models}) == 1, "the first model, whose name the others start from"
    for path in changed - models:
        if isinstance(whole.get(path), int | float) and isinstance(small[path], int | float):
            assert small[path] < whole[path] or path == "data.max_rejected", path


def rows(count: int) -> list[dict[str, str]]:
    words = ["river", "stone", "cloud", "tree", "house", "road", "light"]
    return [
        {"instruction": f"Say something of the {words[n % 7]} number {n}.", "context": "" if n % 3 else f"It is {n}.",
         "response": f"The {words[n % 7]} number {n} is {words[n % 5]} and {words[n % 3]}.", "category": "qa"}
        for n in range(count)
    ]  # fmt: skip


def data_of(name: str, folder: Path) -> list[str]:
    """What stands for the data of a recipe, which is on the hub: settings."""
    if name.startswith("wiki"):
        text = "".join(f"\n = Title {n} = \n\n" + " ".join(row["response"] for row in rows(60)) for n in range(20))
        (folder / "wiki.txt").write_text(text)
        return ["data.source=wiki.txt", "data.subset=null"]
    if name.startswith("pairs"):
        for level, source in enumerate(("strong", "medium", "weak")):
            lines = [
                {"instruction": row["instruction"], "input": row["context"], "output": row["response"][level * 7 :]}
                for row in rows(140)
            ]
            (folder / f"{source}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return []
    (folder / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(140)))
    return ["data.source=dolly.jsonl"]


def answer(seen: Seen) -> Any:
    return written(seen, "A" if "More helpful:" in str(seen.prompt) or "Better:" in str(seen.prompt) else "Not so.")


@pytest.mark.parametrize("name", PAPERS)
def test_every_recipe_runs_at_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    settings = data_of(name, tmp_path)
    with serve(answer) as server:
        if load_recipe(name).apis:
            settings += [f"apis.gpt.url={server.url}"]
        options = [part for setting in settings for part in ("--set", setting)]
        done: Result = cli("run", name, "--scale", "smoke", *options)
        assert done.status == 0, done.err
        asked = len(server.seen)
        again: Result = cli("run", name, "--scale", "smoke", *options)
        assert again.status == 0, again.err
        assert len(server.seen) == asked
    report = (tmp_path / "runs" / f"{name}-smoke" / "report.html").read_text()
    recipe = load_recipe(name)
    assert all(of.source in report for of in recipe.published)
    assert bool(recipe.published) == ("Published figures" in report)


@pytest.mark.parametrize("name", PAPERS)
def test_small_needs_nothing_from_outside(name: str) -> None:
    recipe, whole = load_recipe(name, scale="small"), load_recipe(name)
    assert recipe.data.preset == "python-docs"
    assert isinstance(recipe.data.tokenizer, TrainedTokenizer)
    assert not recipe.apis
    trainings = recipe.trainings()
    for training_name, training in trainings.items():
        assert not isinstance(training.init, str) or training.init in trainings
        assert training.reference in (None, *trainings)
        if training_name in whole.train:
            assert training.objective == whole.train[training_name].objective
            assert training.steps < whole.train[training_name].steps
            assert training.curriculum == whole.train[training_name].curriculum
            assert training.pairs == whole.train[training_name].pairs
    assert recipe.evaluate is not None
    assert whole.evaluate is not None
    assert recipe.evaluate.systems == whole.evaluate.systems
    assert recipe.evaluate.ensembles == whole.evaluate.ensembles
    assert {judge.kind for judge in recipe.evaluate.judges.values()} == {"similarity", "longer"}
    assert recipe.evaluate.baseline in recipe.evaluate.systems, "similarity knows no win against the ground truth"
    assert recipe.evaluate.mauve_model is None
    assert recipe.negatives is not None
    assert all(pool.model in trainings for pool in recipe.negatives.pools.values())


def test_pools_at_small_are_written_by_models_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["train.medium.steps=2", "train.weak.steps=2", "negatives.max_examples=16", "data.max_rows=60",
                "data.validation=50", "data.test=50"]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    for command in (["prepare"], ["train", "medium", "weak"], ["generate-negatives"], ["rank"]):
        done: Result = cli(command[0], "pairs-curriculum", *command[1:], "--scale", "small", *options)
        assert done.status == 0, done.err
    assert "groups: 16" in done.err
    assert "K 3.00 on average" in done.err


def test_a_scale_that_is_not_there_is_named() -> None:
    with pytest.raises(
        InputError, match="--scale smok: the recipe dolly-gpt2-xl has no such scale; did you mean smoke"
    ):
        load_recipe("dolly-gpt2-xl", scale="smok")
    with pytest.raises(InputError, match="--scale smoke: the recipe pairs has no such scale; there are none"):
        load_recipe("pairs", scale="smoke")


def test_what_stands_in_several_places_is_changed_in_one(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(
        "data: {source: x.jsonl, tokenizer: t, test: 1}\n"
        "train:\n  a: &a {init: m, objective: mle, lora: {rank: 4}}\n  b: *a\n"
        "scales: {small: {'train.*.lora': {rank: 2}, 'negatives.pools.*.count': 3}}\n"
    )
    for scale, other in ((None, 4), ("small", 2)):
        recipe = load_recipe(str(path), ["train.a.lora.rank=9"], scale)
        assert [training.lora.rank for training in recipe.train.values() if training.lora] == [9, other]
    path.write_text(path.read_text().replace("small: {'train.*.lora'", "10: {1"))
    with pytest.raises(InputError, match=r"scales\.10: 1 is no key as for --set: put it in quotes"):
        load_recipe(str(path), scale="10")


def test_overrides_come_after_the_scale() -> None:
    recipe = load_recipe("dolly-gpt2-xl", ["train.mle.steps=7"], "smoke")
    assert (recipe.train["mle"].steps, recipe.train["anr"].steps) == (7, 2)
    assert {*PAPERS} < builtin_recipes().keys()
