"""Validation groups: which they are, what is measured of them, and `keep: best`."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import InputError
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from tests.support.resume import assert_same_training, interrupted_at, save_often
from tests.support.training import CANDIDATES, Bench, measured, naive_logprob, validation_ids, weights


def many(count: int) -> dict[str, Any]:
    return {f"g{number}": ([5 + number, 6], [[7, 0], [8 + number, 0]], [0, 1]) for number in range(count)}


def test_which_groups_are_for_validation_hardly_depends_on_which_others_there_are(
    tmp_path: Path, tiny_model: Path
) -> None:
    whole = validation_ids(Bench(tmp_path, tiny_model, many(40)), 8)
    assert len(whole) == 8
    backwards = dict(reversed(many(40).items()))
    assert validation_ids(Bench(tmp_path, tiny_model, backwards), 8) == whole
    for gone in many(40):
        left = {name: group for name, group in many(40).items() if name != gone}
        now = validation_ids(Bench(tmp_path, tiny_model, left), 8)
        assert whole - {gone} <= now, "one is replaced at most"
        assert (now == whole) == (gone not in whole)
    assert validation_ids(Bench(tmp_path, tiny_model, many(40)), 7) < whole


@pytest.mark.slow
def test_validation_groups_leave_no_trace_in_the_weights(tmp_path: Path, tiny_model: Path) -> None:
    names = validation_ids(Bench(tmp_path, tiny_model), 2)
    settings: dict[str, Any] = {"validation": 2, "batch_size": 2, "max_steps": 3, "mle_weight": 0.5}
    artifact = Bench(tmp_path / "a", tiny_model).train("cpo", **settings)
    assert artifact.manifest["groups"] == 2
    others = {name: ([40, 41], [[50, 51, 0], [52, 0]], [0, 1]) if name in names else group
              for name, group in CANDIDATES.items()}  # fmt: skip
    again = Bench(tmp_path / "b", tiny_model, others).train("cpo", **settings)
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(artifact).items())
    assert measured(again, "validation_loss")[0] != measured(artifact, "validation_loss")[0]
    # Without them in the selection at all, it is the same training.
    left = {name: group for name, group in CANDIDATES.items() if name not in names}
    alone = Bench(tmp_path / "c", tiny_model, left).train("cpo", **settings | {"validation": 0})
    assert all(torch.equal(weights(alone)[name], tensor) for name, tensor in weights(artifact).items())


def test_validation_measurements_are_those_of_the_weights_after_the_step(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    settings: dict[str, Any] = {"validation": 2, "batch_size": 2, "eval_steps": 2, "beta": 0.5, "mle_weight": 0.25}
    rows = pq.read_table(bench.train("cpo", max_steps=6, **settings).path / METRICS_FILE).to_pylist()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["validation_loss"] is not None] == [0, 2, 4, 6]
    assert [row["step"] for row in rows if row["loss"] is not None] == [0, 1, 2, 3, 4, 5]
    frozen = AutoModelForCausalLM.from_pretrained(bench.model.path)
    for steps in (0, 4, 6):
        made = bench.train("cpo", max_steps=steps, **settings).path if steps else bench.model.path
        model = AutoModelForCausalLM.from_pretrained(made)
        listwise, drop, nll, tokens, won = [], 0.0, 0.0, 0, 0
        for name in validation_ids(bench, 2):
            prompt, candidates, _ = CANDIDATES[name]
            with torch.no_grad():
                policy = torch.stack([naive_logprob(model, prompt, ids) for ids in candidates])
                reference = torch.stack([naive_logprob(frozen, prompt, ids) for ids in candidates])
            reward = 0.5 * (policy - reference)
            listwise.append(float(reward.logsumexp(0) - reward[0]))
            won += bool(reward[0] > reward[1:].max())
            drop += float(reference[0] - policy[0])
            nll -= float(policy[0])
            tokens += len(candidates[0])
        row = rows[steps]
        assert row["validation_preference_loss"] == pytest.approx(sum(listwise) / 2, rel=1e-4)
        assert row["validation_loss"] == pytest.approx(sum(listwise) / 2 + 0.25 * nll / tokens, rel=1e-4)
        assert row["validation_target_logprob"] == pytest.approx(-nll / 2, rel=1e-4)
        assert row["validation_target_drop_per_token"] == pytest.approx(drop / tokens, rel=1e-3, abs=1e-4)
        assert row["validation_reward_accuracy"] == won / 2


def test_mle_measures_its_validation_examples_too(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    artifact = bench.train("mle", max_steps=2, batch_size=2, validation=1)
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    prompt, (target, *_), _ = CANDIDATES[validation_ids(bench, 1).pop()]
    with torch.no_grad():
        nll = -float(naive_logprob(model, prompt, target)) / len(target)
    assert measured(artifact, "validation_loss")[2] == pytest.approx(nll, rel=1e-4)


BEST: dict[str, Any] = {"batch_size": 2, "validation": 2, "eval_steps": 2, "learning_rate": 0.003, "beta": 0.1}


def test_keep_best_exports_the_weights_of_the_lowest_validation_loss(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "a", tiny_model)
    artifact = bench.train("cpo", max_steps=9, keep="best", **BEST)
    losses = measured(artifact, "validation_loss")
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < 9, "neither the first nor the last"
    then = bench.train("cpo", max_steps=best, **BEST)
    assert all(torch.equal(weights(artifact)[name], tensor) for name, tensor in weights(then).items())
    # Stopped right after every step, the best one too, it keeps the same.
    rough = Bench(tmp_path / "b", tiny_model)
    for step in range(1, 9):
        with monkeypatch.context() as patch:
            patch.setattr("cpo_pipe.trainer.loop.lr_factor", interrupted_at(step))
            with pytest.raises(KeyboardInterrupt, match=f"saved after step {step}"):
                rough.train("cpo", max_steps=9, keep="best", **BEST)
    assert_same_training(rough.train("cpo", max_steps=9, keep="best", **BEST).path, artifact.path)


def test_of_equally_good_weights_those_that_came_first_are_kept(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small a learning rate changes nothing; as in a training whose validation loss has come down to 0.
    save_often(monkeypatch)
    bench = Bench(tmp_path, tiny_model)
    artifact = bench.train("cpo", max_steps=4, keep="best", **BEST | {"learning_rate": 1e-30, "eval_steps": 1})
    losses = measured(artifact, "validation_loss")
    assert list(losses) == [0, 1, 2, 3, 4]
    assert len({*losses.values()}) == 1
    assert all(torch.equal(weights(artifact)[name], tensor) for name, tensor in weights_at(tiny_model).items())


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_where_no_step_is_better_the_initial_weights_are_kept_and_that_is_said(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lora: Any
) -> None:
    # From a model that knows the targets by heart, so large a learning rate leads only away.
    settings: dict[str, Any] = {
        "max_steps": 4,
        "validation": 1,
        "batch_size": 3,
        "eval_steps": 1,
        "learning_rate": 1.0,
        "lora": lora,
    }
    learnt = Bench(tmp_path / "learnt", tiny_model).train("mle", max_steps=30, learning_rate=0.01).path
    caplog.clear()
    bench = Bench(tmp_path / "a", learnt)
    artifact = bench.train("mle", keep="best", **settings)
    losses = measured(artifact, "validation_loss")
    assert min(losses.values()) == losses[0] < min(losses[step] for step in (1, 2, 3, 4))
    before = weights_at(learnt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(artifact).items())
    said = [record.getMessage() for record in caplog.records if "keeps the initial weights" in record.getMessage()]
    assert said == [
        f"train t: no step lowered the validation loss below the {losses[0]:.4f} of the initial weights; keeps the "
        "initial weights; lower learning_rate, or measure more often (eval_steps)"
    ]
    # Stopped and resumed, too.
    rough = Bench(tmp_path / "b", learnt)
    with monkeypatch.context() as patch:
        patch.setattr("cpo_pipe.trainer.loop.lr_factor", interrupted_at(2))
        with pytest.raises(KeyboardInterrupt):
            rough.train("mle", keep="best", **settings)
    assert_same_training(rough.train("mle", keep="best", **settings).path, artifact.path)


def weights_at(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("count", [4, 5])
def test_as_many_validation_groups_as_there_are_are_refused(tmp_path: Path, tiny_model: Path, count: int) -> None:
    bench = Bench(tmp_path, tiny_model)
    with pytest.raises(InputError, match=rf"^train\.t\.validation is {count}, but there are only 4 groups"):
        bench.train("cpo", validation=count)
    assert bench.train("cpo", validation=3).manifest["groups"] == 1
