"""A recipe's sections: decodings, values of several forms, paths, and a description of every key."""

from typing import Any

import pytest
import yaml

from cpo_pipe.data.final_answer import AnswerFinder
from cpo_pipe.data.models.model import ScratchModel
from cpo_pipe.data.models.train_tokenizer import TrainedTokenizer
from cpo_pipe.eval.config import System
from cpo_pipe.pipeline.negatives.autoregressive import Autoregressive
from cpo_pipe.pipeline.negatives.pool import Pool
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.recipe.load import load_recipe, parse_recipe
from cpo_pipe.recipe.recipe import Recipe
from cpo_pipe.recipe.render import recipe_text
from cpo_pipe.trainer.objectives.dpo import DPO
from tests.support.recipes import CPO, DATA, MLE, content, evaluation, refusal


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
def test_contradictory_decoding_settings_are_refused(decoding: dict[str, Any], message: str) -> None:
    assert refusal(**evaluation(decodings={"d": decoding})).startswith(f"evaluate.decodings.d{message}")


def test_beam_search_defaults_to_temperature_0_and_needs_transformers() -> None:
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


def test_sample_seed_requires_examples() -> None:
    message = refusal(**evaluation(sample_seed=3))
    assert message == (
        "evaluate: sample_seed is 3, but examples is missing; set the number to draw, or remove sample_seed"
    )


def test_fields_that_take_a_name_or_a_section() -> None:
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


def test_the_gsm8k_pattern_finds_the_answer() -> None:
    evaluation = load_recipe("gsm8k").evaluate
    assert evaluation is not None
    finder = AnswerFinder(evaluation.judges["exact"].pattern, "pattern")
    answers = {"#### 18.": "18", "####-1,234.50 kg": "-1234.5", "so\n####  $7": "7", "#### .": None, "7": None}
    assert {text: finder.answer(text) for text in answers} == answers


def test_every_field_is_described() -> None:
    from cpo_pipe.data.config import Section

    def below(section: type[Section]) -> list[type[Section]]:
        return [found for child in section.__subclasses__() for found in (child, *below(child))]

    sections = [section for section in below(Section) if section.__module__.startswith("cpo_pipe.")]
    assert {Recipe, DPO, EmbeddingScorer, Autoregressive} <= {*sections}
    undescribed = [f"{s.__name__}.{name}" for s in sections for name, f in s.model_fields.items() if not f.description]
    assert undescribed == []


def test_a_leading_tilde_means_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
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
