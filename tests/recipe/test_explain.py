"""Messages for unknown keys and wrong values."""

import re
from typing import Any

import pytest

from cpo_pipe.data.errors import Problems
from cpo_pipe.data.text import nearest
from cpo_pipe.pipeline.negatives.registry import STRATEGIES
from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.recipe.load import parse_recipe
from cpo_pipe.recipe.other_names import OTHER_NAMES
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.trainer.lora import Lora
from cpo_pipe.trainer.objectives import OBJECTIVES
from tests.support.recipes import DATA, MLE, NEGATIVES, SYSTEMS, content, refusal

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
def test_an_unknown_key_is_answered_with_the_nearest_known_one(sections: dict[str, Any], where: str, near: str) -> None:
    assert refusal(**sections) == f"{where} is not a known key; did you mean {near}?"


def test_an_unknown_key_without_a_near_match_lists_all_known_keys() -> None:
    known = "by, drop_duplicates, batch_size, model, long_texts"
    assert refusal(rank={"zzz": 1}) == f"rank.zzz is not a known key; known are {known}"
    assert refusal(zzz=1).endswith(
        "known are name, note, data, apis, train, negatives, rank, iterations, evaluate, published, sweep, scales"
    )


def test_the_nearest_name_is_suggested() -> None:
    assert nearest("cop", ["cpo", "mle"], "the training ") == "did you mean the training cpo?"
    assert nearest("whatever", ["cpo", "mle"]) == ""


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
        ({"evaluate": {"systems": {"a": {}}, "baseline": "a"}}, "evaluate.systems.a: give either model, merge or file"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_with_its_rule(sections: dict[str, Any], message: str) -> None:
    assert refusal(**sections).startswith(message)


def test_all_broken_rules_are_reported() -> None:
    with pytest.raises(Problems) as caught:
        parse_recipe(
            content(
                data={**DATA, "sorce": "x", "split_seed": -1},
                train={"a": {**MLE, "max_steps": 0}, "b": {**MLE, "init": {"architcture": "llama"}}},
                negatives={"sources": {"autoregressive": {"modle": "m"}}},
            ),
            "r.yaml",
        )
    assert [line.removeprefix("recipe r.yaml: ").split(" is ")[0] for line in caught.value.messages] == [
        "data.split_seed", "data.sorce", "train.a.max_steps", "train.b.init.architcture",
        "negatives.sources.autoregressive.modle",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("per_device_train_batch_size", "batch_size, the groups of one optimizer step over all devices"),
        ("num_train_epochs", "max_steps; an epoch is the number of examples divided by batch_size"),
        ("lora_r", "lora.r"),
        ("target_modules", "lora.target_modules"),
        ("lora_alpha", "lora.lora_alpha"),
        ("max_length", "data.max_prompt_tokens and data.max_target_tokens"),
        ("bf16", "dtype: bfloat16"),
        ("ref_model", "reference"),
    ],
)
def test_the_keys_of_trl_and_peft_are_answered_with_ours(key: str, ours: str) -> None:
    assert refusal(train={"a": {**MLE, key: 1}}) == f"train.a.{key} is not a known key; use {ours}"


def test_the_answers_to_other_keys_name_keys_that_exist() -> None:
    sections = [
        Recipe,
        Data,
        Lora,
        *(OBJECTIVES[name] for name in OBJECTIVES),
        *(STRATEGIES[name] for name in STRATEGIES),
    ]
    known = {key for section in sections for key in section.model_fields}
    for key, answer in OTHER_NAMES.items():
        assert key not in known
        first = re.match(r"(?:data\.|lora\.)?(\w+)", answer)
        assert answer.startswith(("no key", "--run-dir")) or (first and first[1] in known), answer
