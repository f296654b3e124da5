"""Loading a recipe: overrides, file names, scales, and limits on its size."""

import time
from pathlib import Path

import pytest
import yaml

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.model import ScratchModel
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.recipe.load import load_recipe, parse_recipe
from tests.support.recipes import CPO, DATA, MLE, SYSTEMS, content, evaluation, written


def test_overrides_change_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, evaluate={"systems": SYSTEMS, "baseline": "base"}),
        [
            "train.cpo.learning_rate=1e-4",  # YAML 1.1 parses this as text, the field as a number
            "train.cpo.max_steps=5",
            "train.cpo.max_steps=6",
            "data.columns.prompt=question",  # a section that the file leaves out
            "train.base.init={architecture: llama, seed: 3}",
            "data.template='Q: {prompt}=\n'",  # further equals signs belong to the value
            "train.third={init: cpo, objective: mle}",
            "evaluate.decodings.hot.temperature=2",
            "rank.by=none",
        ],
    )
    assert (recipe.train["cpo"].learning_rate, recipe.train["cpo"].max_steps) == (1e-4, 6)
    assert recipe.data.columns.prompt == "question"
    assert recipe.train["base"].init == ScratchModel(architecture="llama", seed=3)
    assert recipe.data.template == "Q: {prompt}= "
    assert recipe.train["third"].init == "cpo"
    assert recipe.evaluate is not None
    assert recipe.evaluate.decodings["hot"].temperature == 2
    assert recipe.rank == NoScorer()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.cop.learning_rate=1", "--set train.cop.learning_rate: cop is not in train; did you mean cpo?"),
        ("train.new.learning_rate=1", "--set train.new.learning_rate: new is not in train; there are base, cpo"),
        ("data.source.x=1", "--set data.source.x: data.source is not a section"),
        ("data.train", "--set data.train: must be section.key=value"),
        ("data.train=]", "--set data.train=]: not valid YAML (line 1, column 1: "),
        ("data.columns={prompt: a, prompt: b}", ": line 1, column 13: duplicate key prompt; remove one"),
        ("data.trian=1", "data.trian is not a known key; did you mean train?"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path), [override])
    assert message in str(caught.value)


def test_the_default_name_is_that_of_the_file(tmp_path: Path) -> None:
    sections = content()
    assert load_recipe(written(tmp_path)).name == "r"
    del sections["name"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(sections))
    assert load_recipe(str(tmp_path / "other.yaml")).name == "other"


def test_a_key_overrides_that_of_a_merge_key(tmp_path: Path) -> None:
    """`<<` shares settings in YAML; a key beside it overrides a shared one and is not a duplicate."""
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"data": DATA})
        + "train:\n  a: &a {init: x, objective: mle, max_steps: 3}\n  b: {<<: *a, max_steps: 4}\n"
    )
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert [training.max_steps for training in recipe.train.values()] == [3, 4]


def test_a_file_takes_precedence_over_a_built_in_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").data.preset == "python-docs"
    (tmp_path / "demo").write_text(yaml.safe_dump(content()))
    assert load_recipe("demo").data.preset == "pairs"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.1.learning_rate=1", "--set train.1.learning_rate: 1 is not in train; there are base, cpo"),
        ("train={1: {init: x}}", "--set train={1: {init: x}}: line 1, column 2: the key 1 is not text; put it in"),
        ("train.cpo.max_steps=" + "9" * 5000, "...: line 1, column 1: a number of 5,000 characters; put it in quotes"),
        ("data=&a {b: *a}", "line 1, column 8: *a is inside &a; an anchor cannot contain itself"),
        ("a" + ".a" * 50 + "=1", "...: nested more than 50 levels deep"),
        ("name=" + "n" * 101, "name is 'nnn"),
        ("train={" + "n" * 300 + ": {init: x, objective: mle}}", "string should have at most 100 characters"),
        ("data.source=" + "x" * 256, "not a valid path: a name has at most 255 bytes, a path 4,095, and neither"),
        ("train.base.init=" + "/x" * 2050, "train.base.init: not a valid path"),
        ('negatives.sources.autoregressive.model="a\\0"', "negatives.sources.autoregressive.model: not a valid path"),
        ("data.source=''", "data.source: an empty path means the current folder; name it `.`, or name another"),
        ("iterations=100000", "iterations is 100000: input should be less than or equal to 100"),
        ("note=" + "[" * 60, "nested more than 50 levels deep"),
    ],
)  # fmt: skip
def test_unusable_values_are_refused_at_load(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path), [override])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_100_iterations_of_100_trainings_and_4000_alphas_load_fast(tmp_path: Path) -> None:
    """A linear search for each training and each α takes minutes."""
    ensembles = {"e": {"of": ["base", "x"], "alphas": [number / 4000 for number in range(4000)]}}
    train = {"base": MLE, **{f"c{number}": CPO for number in range(100)}}
    start = time.process_time()
    recipe = parse_recipe(content(train=train, iterations=100, **evaluation(ensembles=ensembles)), "r")
    assert time.process_time() - start < 2
    assert recipe.training_order()[-1] == "c99@100"
    assert recipe.evaluate is not None
    assert len(recipe.evaluate.all_systems()) == 4001


def test_a_scale_cannot_exceed_the_size_limit_of_a_recipe(tmp_path: Path) -> None:
    train = {f"t{number}": MLE for number in range(200)}
    scales = {"small": {f"train.*.x{number:03}": number for number in range(200)}}
    with pytest.raises(InputError, match=r"r.yaml: scales\.small\.train\.\*\.x025: the scale writes more than 5,000 v"):
        load_recipe(written(tmp_path, train=train, scales=scales).removesuffix("\n"), scale="small")


def test_a_scale_may_write_into_the_scales(tmp_path: Path) -> None:
    scales = {"small": {"scales.small.note": "x", "data.train": 3}}
    recipe = load_recipe(written(tmp_path, scales=scales), scale="small")
    assert recipe.data.train == 3
    assert recipe.scales["small"] == {**scales["small"], "note": "x"}


def test_an_oversized_recipe_or_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("#" * 300_000)
    with pytest.raises(InputError, match=r"long\.yaml: has 300,000 bytes; at most 262,144 are read"):
        load_recipe(str(tmp_path / "long.yaml"))
    with pytest.raises(InputError, match=r"x: cannot be read \(File name too long\)"):
        load_recipe("x" * 300)


def test_a_name_without_its_suffix_is_answered_with_the_file(tmp_path: Path) -> None:
    name = written(tmp_path).removesuffix(".yaml")
    with pytest.raises(InputError, match=rf"recipe {name}: no such file; did you mean {name}\.yaml\?"):
        load_recipe(name)


def test_every_recipe_has_the_scale_smoke(tmp_path: Path) -> None:
    evaluation = {"systems": {"base": {"model": "base"}}, "baseline": "base", "examples": 5}
    train = {"base": {**MLE, "max_steps": 1000, "batch_size": 2, "keep": "best", "validation": 50}, "cpo": CPO}
    path = written(tmp_path, train=train, evaluate=evaluation, data={**DATA, "test": 100})
    small = load_recipe(path, scale="smoke")
    assert small.name == "r-smoke"
    assert (small.data.max_rows, small.data.test) == (300, 24)
    base = small.train["base"]
    assert (base.max_steps, base.batch_size, base.validation) == (3, 2, 4)
    assert small.train["cpo"].max_steps == 3
    assert small.negatives is not None
    assert small.evaluate is not None
    assert (small.negatives.max_examples, small.evaluate.examples, small.evaluate.bootstrap) == (16, 5, 100)
    assert base.init == load_recipe(path).train["base"].init, "the models stay"
    own = written(tmp_path, scales={"smoke": {"train.*.max_steps": 7}})
    assert load_recipe(own, scale="smoke").train["base"].max_steps == 7, "a recipe's own scale comes first"
