"""The identity of a training: which settings and inputs invalidate its checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.store import Rows
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.train import train, training_spec
from tests.support.training import CANDIDATES, Bench


@pytest.mark.slow
def test_a_complete_training_is_repeated_only_when_it_changes(bench: Bench) -> None:
    def count() -> int:
        return len(list(bench.store.root.glob("checkpoints/*/manifest.json")))

    first = bench.train("cpo")
    assert (
        bench.train("cpo", micro_batch_tokens=1, logits_mb=1, gradient_checkpointing=True, attention="dense").path
        == first.path
    )
    assert count() == 1
    log_probs = bench.store.rows("reference-logprobs", {"model": bench.model.fingerprint, "dtype": "float32"})
    shards = log_probs.files()
    for number, change in enumerate(
        [{"beta": 1.0}, {"learning_rate": 1e-4}, {"seed": 1}, {"length_normalize": True}, {"max_steps": 1},
         {"lr_scheduler_type": "linear"}, {"objective": "cpo-ranked"}, {"mle_weight": 1.0}, {"batch_size": 2},
         {"validation": 1}]
    ):  # fmt: skip
        bench.train(**{"objective": "cpo", **change})
        assert count() == number + 2
    fewer = bench.store.rows("groups", {"of": "n = 1"})
    with fewer.writer() as writer:
        rows = bench.groups().read(list(CANDIDATES)).to_pylist()
        writer.add([{**row, "candidates": row["candidates"][:2]} for row in rows])
    config = OBJECTIVES.parse({"init": "m", "objective": "cpo", "reference": "m", "max_steps": 1, "batch_size": 4})
    train("t", config, bench.store, replace(bench.inputs("cpo"), groups=fewer), None, LocalExecutor())
    assert log_probs.files() == shards, "no reference log-prob is computed again"


def test_the_order_of_negatives_is_identity_only_for_objectives_that_use_it(bench: Bench) -> None:
    def groups(embedder: str) -> Rows:
        rows = bench.store.rows("groups", {"of": "the test", "scorer": {"embedder": embedder}})
        with rows.writer() as writer:
            writer.add(bench.groups().read(list(CANDIDATES)).to_pylist())
        return rows

    def train_on(objective: str, embedder: str) -> Path:
        config = OBJECTIVES.parse(
            {"init": "m", "objective": objective, "reference": "m", "max_steps": 1, "batch_size": 4}
        )
        inputs = replace(bench.inputs(objective), groups=groups(embedder))
        return train("t", config, bench.store, inputs, None, LocalExecutor()).path

    assert train_on("cpo", "one") == train_on("cpo", "other")
    assert train_on("cpo-ranked", "one") != train_on("cpo-ranked", "other")


# For each setting: the settings it needs, the value it is changed to, and whether that changes the weights.
_CONTRAST = {"objective": "cpo", "reference": "m"}


_PAIRS = {**_CONTRAST, "pairs": [["target", "a"]]}


CHANGES: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "objective": (_CONTRAST, "apo-zero", True),
    "pairs": (_PAIRS, [["target", "b"]], True),
    "curriculum": ({**_CONTRAST, "curriculum": {"by": "margin"}}, {"by": "similarity"}, True),
    "max_steps": ({}, 3, True),
    "batch_size": ({}, 5, True),
    "learning_rate": ({}, 1e-4, True),
    "decay_biases_and_norms": ({}, True, True),
    "beta": (_CONTRAST, 0.2, True),
    "mle_weight": (_CONTRAST, 0.5, True),
    "label_smoothing": ({"objective": "dpo", "reference": "m"}, 0.1, True),
    "margin": ({"objective": "slic"}, 2.0, True),
    "length_normalize": (_CONTRAST, True, True),
    "sequences": ({"objective": "pss"}, 2, True),
    "replace": ({"objective": "pss"}, 0.3, True),
    "weight_decay": ({}, 0.1, True),
    "adam_beta1": ({}, 0.8, True),
    "adam_beta2": ({}, 0.99, True),
    "adam_epsilon": ({}, 1e-7, True),
    "lr_scheduler_type": ({}, "cosine", True),
    "warmup_steps": ({}, 1, True),
    "max_grad_norm": ({}, 1.0, True),
    "seed": ({}, 1, True),
    "dtype": ({}, "bfloat16", True),
    "lora": ({}, {"r": 2}, True),
    "validation": ({}, 1, True),
    "stop_on": ({}, ["divergence"], True),
    "keep": ({"validation": 1}, "best", True),
    "eval_steps": ({"validation": 1}, 7, False),
    # The content of these counts, which a training takes as inputs.
    "init": ({}, "other", False),
    "reference": (_CONTRAST, "other", False),
    "negatives": (_CONTRAST, {"batch": 1}, False),
    "attention": ({}, "padded", False),
    "gradient_checkpointing": ({}, True, False),
    "micro_batch_tokens": ({}, 64, False),
    "logits_mb": ({}, 16, False),
    "report_to": ({}, ["tensorboard"], False),
}


def test_every_setting_is_listed_as_identity_or_not() -> None:
    assert CHANGES.keys() == {field for name in OBJECTIVES for field in OBJECTIVES[name].model_fields}


@pytest.mark.parametrize("field", CHANGES)
def test_exactly_the_settings_that_change_the_weights_change_the_hash(bench: Bench, field: str) -> None:
    base, value, other = CHANGES[field]
    settings = {"init": "m", "objective": "mle", "max_steps": 2, **base}
    specs = []
    for more in ({}, {field: value}):
        config = OBJECTIVES.parse(settings | more)
        specs.append(training_spec(config, bench.inputs(config.objective)))
    assert (specs[0] != specs[1]) is other


def test_eval_steps_are_identity_only_when_they_choose_the_weights(bench: Bench) -> None:
    settings = {"init": "m", "objective": "mle", "validation": 1, "keep": "best"}
    one, two = (OBJECTIVES.parse(settings | {"eval_steps": every}) for every in (5, 7))
    inputs = bench.inputs("mle")
    assert training_spec(one, inputs) != training_spec(two, inputs)


def test_the_embedder_of_the_negatives_is_identity_where_their_order_is(bench: Bench) -> None:
    def spec(embedder: str, **settings: Any) -> Any:
        config = OBJECTIVES.parse({"init": "m", "objective": "cpo", "reference": "m", **settings})
        groups = bench.store.rows("groups", {"of": "the test", "scorer": {"embedder": embedder}})
        return training_spec(config, replace(bench.inputs("cpo"), groups=groups))

    pairs = [["target", "a"], ["target", "b"]]
    for settings, counts in (
        ({}, False),
        ({"objective": "cpo-ranked"}, True),
        ({"objective": "cpo-ranked", "pairs": pairs}, False),  # a pair has its own order
        ({"curriculum": {"by": "similarity"}}, True),
        ({"curriculum": {"by": "margin"}}, False),
    ):
        assert (spec("one", **settings) != spec("other", **settings)) is counts, settings
