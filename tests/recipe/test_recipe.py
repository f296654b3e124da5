"""Recipes: what is refused and with which words, overrides, order of trainings, and the text that `init` prints."""

import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.model import ScratchModel
from cpo_pipe.data.models.train_tokenizer import TrainedTokenizer
from cpo_pipe.data.text import nearest
from cpo_pipe.eval.config import System
from cpo_pipe.pipeline.negatives.autoregressive import Autoregressive
from cpo_pipe.pipeline.negatives.pool import Pool
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.recipe.load import load_recipe, parse_recipe
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.recipe.render import recipe_text
from cpo_pipe.trainer.objectives.dpo import DPO

DATA = {"source": "pairs.jsonl", "tokenizer": "folder", "train": 8, "test": 2}
MLE = {"init": "folder", "objective": "mle"}
CPO = {"init": "base", "objective": "cpo", "reference": "base"}
NEGATIVES = {"sources": {"autoregressive": {"model": "base"}}}


def content(**sections: Any) -> dict[str, Any]:
    whole = {"name": "r", "data": DATA, "train": {"base": MLE, "cpo": CPO}, "negatives": NEGATIVES}
    return {**whole, **sections}


def refusal(**sections: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(content(**sections), "r.yaml")
    message = str(caught.value)
    assert message.startswith("recipe r.yaml: ")
    assert "\n" not in message
    return message.removeprefix("recipe r.yaml: ")


def written(folder: Path, **sections: Any) -> str:
    (folder / "r.yaml").write_text(yaml.safe_dump(content(**sections)))
    return str(folder / "r.yaml")


# ── unknown keys, at every level ─────────────────────────────────────────────────────────────────────────────────

SYSTEMS = {"base": {"model": "base"}}
UNKNOWN = [
    ({"negativs": {}}, "negativs", "negatives"),
    ({"data": {**DATA, "sorce": "x"}}, "data.sorce", "source"),
    ({"data": {**DATA, "columns": {"promt": "x"}}}, "data.columns.promt", "prompt"),
    ({"data": {**DATA, "tokenizer": {"vocab_sise": 300}}}, "data.tokenizer.vocab_sise", "vocab_size"),
    ({"train": {"base": {**MLE, "bach_size": 3}}}, "train.base.bach_size", "batch_size"),
    ({"train": {"base": {**MLE, "init": {"architcture": "llama"}}}}, "train.base.init.architcture", "architecture"),
    ({"train": {"Rank": {**MLE, "max_stesp": 3}}}, "train.Rank.max_stesp", "max_steps"),
    ({"train": {"str": {**MLE, "init": {"sed": 3}}}}, "train.str.init.sed", "seed"),
    ({"negatives": {"surces": {}}}, "negatives.surces", "sources"),
    ({"negatives": {"sources": {"autoregressive": {"modle": "m"}}}}, "negatives.sources.autoregressive.modle", "model"),
    ({"negatives": {"sources": {"x": {"strategy": "pool", "file": "x", "columns": {"promt": "a"}}}}},
     "negatives.sources.x.columns.promt", "prompt"),
    ({"rank": {"drop_duplicate": True}}, "rank.drop_duplicate", "drop_duplicates"),
    ({"evaluate": {"systems": SYSTEMS, "base_line": "base"}}, "evaluate.base_line", "baseline"),
    ({"evaluate": {"systems": {"a": {"modl": "b"}}, "baseline": "a"}}, "evaluate.systems.a.modl", "model"),
    (
        {"evaluate": {"systems": SYSTEMS, "baseline": "base", "decodings": {"g": {"temprature": 0}}}},
        "evaluate.decodings.g.temprature",
        "temperature",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "where", "near"), UNKNOWN, ids=[case[1] for case in UNKNOWN])
def test_an_unknown_key_gets_the_nearest_known_one(sections: dict[str, Any], where: str, near: str) -> None:
    assert refusal(**sections) == f"{where} is not a known key; did you mean {near}?"


def test_an_unknown_key_like_none_gets_all_known_ones() -> None:
    known = "by, drop_duplicates, batch_size, model, long_texts"
    assert refusal(rank={"zzz": 1}) == f"rank.zzz is not a known key; known are {known}"
    assert refusal(zzz=1).endswith(
        "known are name, note, data, apis, train, negatives, rank, iterations, evaluate, published, scales"
    )


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
def test_long_texts_and_mappings_come_back_as_they_were(text: str, tmp_path: Path) -> None:
    scales = {
        "small": {"data.source": text, "train.*.max_steps": 3, "apis": {}, "rank": {"model": text, "batch_size": 2}}
    }
    recipe = parse_recipe(content(note=text, scales=scales), "r")
    (tmp_path / "r.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    again = load_recipe(str(tmp_path / "r.yaml"))
    assert again == recipe
    assert (again.note, again.scales) == (text, scales)


def test_nearest() -> None:
    assert nearest("cop", ["cpo", "mle"], "the training ") == "did you mean the training cpo?"
    assert nearest("whatever", ["cpo", "mle"]) == ""


# ── wrong values ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"a": {**MLE, "init": 3}}}, "train.a.init is 3: input should be a valid string or a section"),
        ({"train": {"a": {**MLE, "init": {}}}}, "train.a.init.architecture is missing"),
        ({"train": {"a": None}}, "train.a is empty: must be a section, that is keys with values, one of"),
        ({"train": ["a"]}, "train is ['a']: must be a section, that is keys with values"),
        ({"train": {1: MLE}}, "train.1 is 1: input should be a valid string"),
        ({"train": {"a b": MLE}}, "train.a b is 'a b': string should match pattern '^[A-Za-z0-9][A-Za-z0-9_.-]*$'"),
        ({"data": {**DATA, "tokenizer": {"vocab_size": 3}}}, "data.tokenizer.vocab_size is 3: input should be greater"),
        ({"rank": "none"}, "rank is 'none': must be a section, that is keys with values"),
        ({"rank": {"by": "nne"}}, "rank: unknown scorer 'nne'; did you mean none?"),
        (
            {"train": {"a": {**MLE, "learning_rate": float("inf")}}},
            "train.a.learning_rate is inf: input should be a finite number",
        ),
        ({"data": {**DATA, "columns": {"prompt": ["x" * 99]}}}, f"data.columns.prompt is ['{'x' * 75}...: input"),
        ({"data": {**DATA, "split_seed": -1}}, "data.split_seed is -1: input should be greater than or equal to 0"),
        ({"train": {"a": {**MLE, "seed": -1}}}, "train.a.seed is -1: input should be greater"),
        ({"train": {"a": {**MLE, "init": {"architecture": "llama", "seed": -1}}}}, "train.a.init.seed is -1: input"),
        ({"negatives": {**NEGATIVES, "seed": -1}}, "negatives.seed is -1: input should be greater"),
        ({"evaluate": {"systems": SYSTEMS, "baseline": "base", "seed": -1}}, "evaluate.seed is -1: input should be"),
        ({"train": {"a": {**MLE, "beta": 2.0}}}, 'train.a.beta: not used by objective "mle" (but by cpo, cpo-ranked,'),
        ({"evaluate": {"systems": SYSTEMS, "baseline": "base", "judges": ["taste"]}},
         "evaluate.judges.taste: unknown judge 'taste'; choose from"),
        ({"evaluate": {"systems": {"a": {}}, "baseline": "a"}}, "evaluate.systems.a: give either model or merge"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_rule(sections: dict[str, Any], message: str) -> None:
    assert refusal(**sections).startswith(message)


def evaluation(**settings: Any) -> dict[str, Any]:
    return {"evaluate": {"systems": SYSTEMS, "baseline": "base", **settings}}


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ({"top_p": 0}, ".top_p is 0: input should be greater than 0"),
        ({"top_p": 1.1}, ".top_p is 1.1: input should be less than or equal to 1"),
        ({"beams": 0}, ".beams is 0: input should be greater than 0"),
        ({"beams": 4, "top_k": 5}, ": top_k is 5, but beams is 4, and beam search does not sample; remove top_k or"),
        ({"beams": 4, "top_p": 0.9}, ": top_p is 0.9, but beams is 4, and beam search does not sample; remove top_p"),
        (
            {"beams": 4, "temperature": 1.0},
            ": temperature is 1, but beams is 4, and beam search does not sample; remove",
        ),
    ],
)
def test_a_decoding_that_contradicts_itself(decoding: dict[str, Any], message: str) -> None:
    assert refusal(**evaluation(decodings={"d": decoding})).startswith(f"evaluate.decodings.d{message}")


def test_beam_search_needs_no_temperature_and_comes_from_transformers() -> None:
    given: list[dict[str, Any]] = [{"beams": 4}, {"beams": 4, "temperature": 0, "top_k": 0, "top_p": 1.0}, {"beams": 1}]
    decodings = {f"d{number}": decoding for number, decoding in enumerate(given)}
    recipe = parse_recipe(content(**evaluation(decodings=decodings)), "r")
    assert recipe.evaluate is not None
    assert [d.temperature for d in recipe.evaluate.decodings.values()] == [0, 0, 1]
    assert parse_recipe(yaml.safe_load(recipe_text(recipe)), "r") == recipe
    message = refusal(**evaluation(decodings=decodings, engine="vllm"))
    assert message == (
        "evaluate: engine is vllm, but decodings.d0 is beam search, which it does not support; set engine to auto or "
        "transformers"
    )


def test_a_sample_has_a_size() -> None:
    message = refusal(**evaluation(sample_seed=3))
    assert message == (
        "evaluate: sample_seed is 3, but examples is missing; set the number to draw, or remove sample_seed"
    )


def test_unions() -> None:
    recipe = parse_recipe(
        content(
            data={**DATA, "tokenizer": {"vocab_size": 300}},
            train={"base": {**MLE, "init": {"architecture": "gpt2", "config": {"n_layer": 1}}}, "cpo": CPO},
            rank={"by": "none"},
            evaluate={"systems": {"both": {"merge": {"base": 0.5, "cpo": 0.5}}}, "baseline": "both"},
        ),
        "r",
    )
    assert recipe.data.tokenizer == TrainedTokenizer(vocab_size=300)
    assert recipe.train["base"].init == ScratchModel(architecture="gpt2", config={"n_layer": 1})
    assert recipe.rank == NoScorer()
    assert recipe.evaluate is not None
    assert recipe.evaluate.systems["both"] == System(merge={"base": 0.5, "cpo": 0.5})


# ── overrides ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, evaluate={"systems": SYSTEMS, "baseline": "base"}),
        [
            "train.cpo.learning_rate=1e-4",  # YAML 1.1 reads a text, the field a number
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
def test_a_bad_override(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path), [override])
    assert message in str(caught.value)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_names_the_recipe_unless_it_says_otherwise(tmp_path: Path) -> None:
    sections = content()
    assert load_recipe(written(tmp_path)).name == "r"
    del sections["name"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(sections))
    assert load_recipe(str(tmp_path / "other.yaml")).name == "other"


def test_merge_keys_may_repeat_what_they_bring(tmp_path: Path) -> None:
    """`<<` is YAML's way to share settings; a key beside it overrides and does not stand twice."""
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"data": DATA})
        + "train:\n  a: &a {init: x, objective: mle, max_steps: 3}\n  b: {<<: *a, max_steps: 4}\n"
    )
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert [training.max_steps for training in recipe.train.values()] == [3, 4]


def test_a_file_goes_before_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").data.preset == "python-docs"
    (tmp_path / "demo").write_text(yaml.safe_dump(content()))
    assert load_recipe("demo").data.preset == "pairs"


# ── order of trainings ───────────────────────────────────────────────────────────────────────────────────────────


def order(**train: dict[str, Any]) -> list[str]:
    return parse_recipe(content(train=train), "r").training_order()


def test_each_training_comes_after_those_it_needs() -> None:
    assert order(b={**MLE, "init": "a"}, a=MLE) == ["a", "b"]
    # `last` needs neither init nor reference from `base`, but its negatives' model is `base`.
    last = {"init": "folder", "objective": "cpo", "reference": "folder"}
    assert order(last=last, base=MLE) == ["base", "last"]
    assert order(last=MLE, base=MLE) == ["last", "base"]  # nothing needs anything: as written


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"a": {**MLE, "init": "a"}}, "train has a cycle: a needs a"),
        ({"a": {**MLE, "init": "b"}, "b": {**MLE, "init": "a"}}, " needs "),
        # The generator of the negatives is trained on them.
        ({"base": {"init": "folder", "objective": "cpo", "reference": "folder"}}, "train has a cycle: base needs base"),
    ],
)
def test_a_cycle(train: dict[str, Any], message: str) -> None:
    explained = refusal(train=train)
    assert explained.startswith("train has a cycle: ")
    assert message in explained


def test_a_cycle_is_told_in_the_order_of_need() -> None:
    train = {"a": {**MLE, "init": "b"}, "b": {**MLE, "init": "c"}, "c": {**MLE, "init": "a"}}
    chain = refusal(train=train).removeprefix("train has a cycle: ").split(" needs ")
    assert len(chain) == 4
    assert all(train[name]["init"] == needed for name, needed in pairwise(chain))


# ── iterations ───────────────────────────────────────────────────────────────────────────────────────────────────────

RANKED = {"init": {"architecture": "gpt2"}, "objective": "cpo-ranked", "reference": "base"}
SLIC = {"init": "base", "objective": "slic"}


def test_an_iteration_follows_the_one_before() -> None:
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


def test_the_model_of_the_iteration_before_generates_and_the_rest_of_negatives_stays() -> None:
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


def test_iterations_are_done_in_order_and_other_trainings_start_from_any() -> None:
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
        # Names with an @ are those of iterations (and, among systems, of ensembles).
        ({"iterations": 2, "train": {"base": MLE, "cpo": CPO, "cpo@2": MLE}}, "train.cpo@2 is 'cpo@2': string should"),
        ({"iterations": 2, "apis": {"cpo@2": {"url": "http://x/v1", "model": "m"}}}, "apis.cpo@2 is 'cpo@2': string"),
        ({"iterations": 2, **evaluation(systems={"base": {"model": "cpo@3"}})},
         "evaluate.systems.base names cpo@3, but iterations is 2; choose from cpo, cpo@2, or "
         "raise iterations"),
        ({"train": {"base": {**MLE, "init": "cpo@2"}, "cpo": CPO}}, "train.base names cpo@2, but iterations is 1"),
        ({"iterations": 2, **evaluation(ensembles={"mix": {"of": ["base@2", "cpo"], "alphas": [0.5]}})},
         "evaluate.ensembles.mix names base@2, but iterations is 2; choose from base, or"),
        ({"iterations": 2, "negatives": {"sources": {"autoregressive": {"model": "cpo@1"}}}},
         "negatives.sources.autoregressive.model names cpo@1, but iterations is 2"),
        # The first round's negatives would come from the second.
        ({"iterations": 2, "negatives": {"sources": {"autoregressive": {"model": "cpo@2"}}}}, "train has a cycle: "),
    ],
)  # fmt: skip
def test_iterations_that_there_are_not(sections: dict[str, Any], message: str) -> None:
    assert refusal(**sections).startswith(message)


def test_every_place_for_a_model_takes_an_iteration() -> None:
    judges = {"likelihood": {"model": "cpo@2"}}
    systems = {"base": {"model": "cpo@2"}, "both": {"merge": {"cpo": 0.5, "cpo@2": 0.5}}}
    ensembles = {"cpo": {"of": ["cpo@2", "base"], "alphas": [0, 1]}}
    sections = evaluation(systems=systems, ensembles=ensembles, judges=judges, mauve_model="cpo@2")
    recipe = parse_recipe(content(iterations=2, **sections), "r")
    assert recipe.evaluate is not None
    of_ensembles = {name for name in recipe.evaluate.all_systems() if "@" in name}
    assert of_ensembles == {"cpo@0", "cpo@1"}
    assert not of_ensembles & recipe.trainings().keys(), "an α is at most 1, a later round at least 2"


# ── the text ─────────────────────────────────────────────────────────────────────────────────────────────────────


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
def test_the_text_reads_back_as_the_same_recipe(tmp_path: Path, sections: dict[str, Any]) -> None:
    recipe = parse_recipe(content(**sections), "r")
    (tmp_path / "r.yaml").write_text(recipe_text(recipe), encoding="utf-8")
    again = load_recipe(str(tmp_path / "r.yaml"))
    assert again == recipe
    assert again.model_dump(exclude_unset=True) == recipe.model_dump(exclude_unset=True)
    assert recipe_text(again) == recipe_text(recipe)


def test_a_text_with_line_breaks_stands_on_one_line(tmp_path: Path) -> None:
    template = "Q: {prompt}\nA:\r\n\u2028é ' \\"
    init = {"architecture": "gpt2", "config": {"note": "a\nb"}}
    recipe = parse_recipe(content(data={**DATA, "template": template}, train={"base": {**MLE, "init": init}}), "r")
    lines = recipe_text(recipe).splitlines()
    assert r'''  template: "Q: {prompt}\nA:\r\n\Lé ' \\"''' in lines
    assert r'      config: {note: "a\nb"}' in lines
    (tmp_path / "r.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


def test_the_name_may_be_left_to_the_file(tmp_path: Path) -> None:
    recipe = parse_recipe(content(), "r")
    (tmp_path / "mine.yaml").write_text(recipe_text(recipe, named=False), encoding="utf-8")
    assert "\n# names the run's folder (default: the file's name)\n# name: r\n" in recipe_text(recipe, named=False)
    assert load_recipe(str(tmp_path / "mine.yaml")) == recipe.model_copy(update={"name": "mine"})
    assert "\nname: mine\n" in recipe_text(load_recipe(str(tmp_path / "mine.yaml")))


def test_the_answer_of_the_gsm8k_recipe() -> None:
    evaluation = load_recipe("gsm8k").evaluate
    assert evaluation is not None
    pattern = evaluation.judges["exact"].pattern
    assert pattern is not None
    answers = {"#### 18.": "18", "####-1,234.50 kg": "-1,234.50", "so\n####  7": "7", "#### .": None}
    for text, answer in answers.items():
        match = re.search(pattern, text)
        assert (match[1] if match else None) == answer


def test_every_field_is_described() -> None:
    from cpo_pipe.data.config import Section

    def below(section: type[Section]) -> list[type[Section]]:
        return [found for child in section.__subclasses__() for found in (child, *below(child))]

    sections = [section for section in below(Section) if section.__module__.startswith("cpo_pipe.")]
    assert {Recipe, DPO, EmbeddingScorer, Autoregressive} <= {*sections}
    undescribed = [f"{s.__name__}.{name}" for s in sections for name, f in s.model_fields.items() if not f.description]
    assert undescribed == []


API = {"url": "http://127.0.0.1:1/v1", "model": "m"}


def test_an_api_key_in_the_recipe_is_refused_and_not_shown() -> None:
    said = refusal(apis={"gpt": {**API, "key": "sk-proj-secret"}})
    assert said.endswith("apis.gpt.key: must be the name of an environment variable, in capitals; never the key itself")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://x/v1?api_key=secret", "contains a query string or fragment, in which a key would be stored"),
        ("https://x/v1#secret", "contains a query string or fragment"),
        ("https://x/v1?", "contains a query string or fragment"),
        ("https://secret@x/v1", "contains a user name or password"),
        ("https://me:secret@x/v1", "contains a user name or password"),
        ("x/v1?api_key=secret", "must be a URL that begins with http:// or https://"),
        ("ftp://x/secret", "must be a URL that begins with"),
        ("https://", "must be a URL that begins with"),
        ("https://[secret", "must be a URL that begins with"),
        ({"secret": "secret"}, "must be a URL that begins with"),
    ],
)
def test_a_key_in_an_apis_url_is_refused_and_not_shown(url: Any, said: str) -> None:
    message = refusal(apis={"gpt": {**API, "url": url}})
    assert message.startswith(f"apis.gpt.url: {said}")
    assert "secret" not in message


def test_a_key_that_is_no_text_is_not_shown_either() -> None:
    assert "secret" not in refusal(apis={"gpt": {**API, "key": ["secret"]}})


def test_an_api_where_weights_are_needed_is_refused_before_it_is_paid() -> None:
    train = {"cpo": {"init": "gpt", "objective": "mle"}}
    assert "train.cpo names gpt, which is an API" in refusal(apis={"gpt": API}, train=train)


def judging(judges: Any, **sections: Any) -> dict[str, Any]:
    evaluation = {"systems": SYSTEMS, "baseline": "base", "judges": judges}
    return content(evaluate=evaluation, apis={"mini": API}, **sections)


def test_a_list_of_judges_is_short_for_those_without_settings() -> None:
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
def test_a_judge_has_the_settings_of_its_kind(judges: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(judging(judges), "r")
    assert str(caught.value).removeprefix("recipe r: ").startswith(message)


# ── bounded time ─────────────────────────────────────────────────────────────────────────────────────────────────


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
def test_what_no_run_can_use_is_refused_at_load(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path), [override])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_100_iterations_of_100_trainings_and_4000_alphas_take_no_time(tmp_path: Path) -> None:
    """Both took minutes or more: each training, and each α, was looked for among all."""
    ensembles = {"e": {"of": ["base", "x"], "alphas": [number / 4000 for number in range(4000)]}}
    train = {"base": MLE, **{f"c{number}": CPO for number in range(100)}}
    start = time.process_time()
    recipe = parse_recipe(content(train=train, iterations=100, **evaluation(ensembles=ensembles)), "r")
    assert time.process_time() - start < 2
    assert recipe.training_order()[-1] == "c99@100"
    assert recipe.evaluate is not None
    assert len(recipe.evaluate.all_systems()) == 4001


def test_a_scale_cannot_write_more_than_a_recipe_may_have(tmp_path: Path) -> None:
    train = {f"t{number}": MLE for number in range(200)}
    scales = {"small": {f"train.*.x{number:03}": number for number in range(200)}}
    with pytest.raises(InputError, match=r"r.yaml: scales\.small\.train\.\*\.x025: the scale writes more than 5,000 v"):
        load_recipe(written(tmp_path, train=train, scales=scales).removesuffix("\n"), scale="small")


def test_a_scale_may_write_into_the_scales(tmp_path: Path) -> None:
    scales = {"small": {"scales.small.note": "x", "data.train": 3}}
    recipe = load_recipe(written(tmp_path, scales=scales), scale="small")
    assert recipe.data.train == 3
    assert recipe.scales["small"] == {**scales["small"], "note": "x"}


def test_a_path_that_begins_with_a_tilde_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    sources = {"autoregressive": {"model": "~/m"}, "p": {"strategy": "pool", "file": "~/pool.jsonl"}}
    recipe = parse_recipe(
        content(
            data={**DATA, "source": "~/a.jsonl", "tokenizer": "~/t"},
            train={"base": {**MLE, "init": "~"}, "cpo": {**CPO, "reference": "~/m"}},
            negatives={"sources": sources},
            **evaluation(annotations="~/l.csv", systems={"base": {"merge": {"~/a": 0.5, "~/b": 0.5}}}),
        ),
        "r",
    )
    assert (recipe.data.source, recipe.data.tokenizer) == ("/home/me/a.jsonl", "/home/me/t")
    assert (recipe.train["base"].init, recipe.train["cpo"].reference) == ("/home/me", "/home/me/m")
    assert recipe.negatives is not None
    generator, pool = recipe.negatives.sources["autoregressive"], recipe.negatives.sources["p"]
    assert isinstance(generator, Autoregressive)
    assert isinstance(pool, Pool)
    assert (generator.model, pool.file) == ("/home/me/m", "/home/me/pool.jsonl")
    assert recipe.evaluate is not None
    assert recipe.evaluate.annotations == "/home/me/l.csv"
    assert recipe.evaluate.systems["base"].merge == {"/home/me/a": 0.5, "/home/me/b": 0.5}
    assert parse_recipe(yaml.safe_load(recipe_text(recipe)), "r") == recipe


def test_a_recipe_of_too_many_bytes_or_too_long_a_name(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("#" * 300_000)
    with pytest.raises(InputError, match=r"long\.yaml: has 300,000 bytes; at most 262,144 are read"):
        load_recipe(str(tmp_path / "long.yaml"))
    with pytest.raises(InputError, match=r"x: cannot be read \(File name too long\)"):
        load_recipe("x" * 300)
