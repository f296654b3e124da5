"""Saturation and divergence: each on both sides of its threshold, and trainings that stop on them."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.loop import Loop
from cpo_pipe.trainer.monitors import NOISE, RISE, SATURATED, WINDOW, Watch
from tests.support.training import Bench, look, metrics, monitored, said, watching


@pytest.fixture(autouse=True)
def _all_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="cpo_pipe")


def steps(
    losses: Sequence[float], *, accuracy: float = 0.8, margin: float = 1.0, first: int = 0, candidates: float = 5.0
) -> list[dict[str, float]]:
    """Rows of a preference training that starts as its reference."""
    return [
        {"step": first + number, "loss": loss, "preference_loss": loss, "reward_accuracy": accuracy,
         "reward_margin": margin, "candidates": candidates, "target_drop_per_token": 0.0}
        for number, loss in enumerate(losses)
    ]  # fmt: skip


LN5 = math.log(5)


def test_a_loss_of_zero_is_saturation_and_a_small_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    assert (SATURATED, WINDOW) == (1e-3, 10)
    look(watching(), steps([LN5, *[0.0011] * 50]))
    look(watching(), steps([LN5, *[0.0] * 9, 0.0011, *[0.0] * 9]))
    assert said(caplog) == [], "not ten steps in a row below the threshold"
    watch = watching()
    look(watch, steps([LN5, *[0.0009] * 9], margin=36.0))
    assert said(caplog) == []
    look(watch, steps([0.0009], margin=36.0, first=10))
    (message,) = said(caplog)
    # beta 5 gives 36, so 0.28 gives 2.
    assert message == (
        "train t, step 10: the preference loss is saturated: it was below 0.001 in the last 10 steps (reward margin "
        "36), so it learns nothing more; with beta 0.3 instead of 5 the log-ratios seen would give a margin of about "
        "2: lower beta, or set length_normalize: true"
    )
    look(watch, steps([0.0] * 50, first=11))
    assert said(caplog) == [], "said once"


def test_the_advice_on_saturation_fits_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    zeros = steps([LN5, *[0.0] * 10], margin=400.0)
    look(Watch("t", monitored(mle_weight=0.5, length_normalize=True, beta=0.1), []), zeros)
    (message,) = said(caplog)
    assert "so only the MLE loss is left; with beta 0.0005 instead of 0.1" in message
    assert "length_normalize" not in message
    look(watching(objective="slic"), zeros)
    (message,) = said(caplog)
    assert message.endswith("stop earlier, or use negatives that are harder to tell from the target")


def test_no_beta_is_suggested_without_a_margin(caplog: pytest.LogCaptureFixture) -> None:
    look(watching(), steps([0.0] * 11, margin=0.0))
    (message,) = [message for message in said(caplog) if "saturated" in message]
    assert "beta" not in message


def test_batches_without_negatives_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    nothing = {"preference_loss": math.nan, "reward_accuracy": math.nan, "reward_margin": math.nan, "loss": 0.0}
    look(watching(), [{"step": n, **nothing, "candidates": 1.0, "target_drop_per_token": 0.0} for n in range(40)])
    assert said(caplog) == []


@pytest.mark.parametrize("objective", ["mle", "pss"])
def test_an_mle_training_cannot_saturate_but_diverge(caplog: pytest.LogCaptureFixture, objective: str) -> None:
    rows = [{"step": n, "loss": 0.0} for n in range(40)]
    look(watching(objective=objective), rows)
    assert said(caplog) == []
    noise = [3.0, 3.4, 2.6, 3.2, 2.8] * 2
    look(watching(objective=objective), [{"step": n, "loss": loss} for n, loss in enumerate([*noise * 3])])
    look(watching(objective=objective), [{"step": n, "loss": loss} for n, loss in enumerate([*noise, *[3.59] * 10])])
    assert said(caplog) == [], "not by a fifth"
    look(watching(objective=objective), [{"step": n, "loss": loss} for n, loss in enumerate([*noise, *[3.61] * 10])])
    (message,) = said(caplog)
    assert message == (
        "train t, step 19: the training diverges: the loss rose from 3 to 3.61 (mean of 10 steps); lower "
        "learning_rate or set max_grad_norm"
    )


def test_a_loss_above_its_start_is_divergence(caplog: pytest.LogCaptureFixture) -> None:
    assert (RISE, NOISE) == (0.2, 4.0)
    look(watching(), steps([LN5, *[LN5 * 1.19] * 40]))
    # Noise of the batches is no divergence: the mean is 1.3 times the start, ± 0.25.
    look(watching(), steps([LN5, *[LN5 * 0.5, LN5 * 2.1] * 20]))
    assert said(caplog) == []
    watch = watching()
    look(watch, steps([LN5, *[LN5 * 1.21] * 9]))
    assert said(caplog) == [], "not yet ten steps after the first"
    look(watch, steps([LN5 * 1.21] * 30, first=10))
    (message,) = said(caplog)
    assert message == (
        "train t, step 10: the training diverges: the loss rose from 1.609 to 1.947 (mean of 10 steps); lower "
        "learning_rate, raise beta or set max_grad_norm"
    )


def test_a_policy_that_does_not_start_as_its_reference_is_compared_with_its_first_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    apart = [{**row, "target_drop_per_token": -0.3} for row in steps([1.0, 3.0] * 5 + [2.3] * 30)]
    look(watching(), apart)
    assert said(caplog) == [], "the first loss alone says nothing"


def test_an_accuracy_below_chance_is_divergence(caplog: pytest.LogCaptureFixture) -> None:
    # Ten batches of 64 groups: chance 1/5 has the standard error 0.0158, four of them are 0.0632.
    look(watching(), steps([LN5] * 40, accuracy=0.14, margin=-0.5))
    look(watching(), steps([LN5] * 40, accuracy=0.0, margin=0.0))  # warm-up: nothing has moved
    look(watching(objective="slic"), steps([LN5] * 40, accuracy=0.0, margin=-9.0))  # no reference: a poor start
    assert said(caplog) == []
    look(watching(), steps([LN5] * 40, accuracy=0.13, margin=-0.5))
    (message,) = said(caplog)
    assert message == (
        "train t, step 10: the training diverges: the target has the highest reward in 13% of the groups (mean of 10 "
        "steps), less than the 20% of chance; lower learning_rate, raise beta or set max_grad_norm"
    )


def test_a_training_stops_only_on_what_it_names(caplog: pytest.LogCaptureFixture) -> None:
    saturated, diverged = steps([LN5, *[0.0] * 10]), steps([LN5, *[9.0] * 10])
    for stop_on, on_saturation, on_divergence in (
        ([], None, None), (["saturation"], "saturation", None), (["divergence"], None, "divergence"),
        (["saturation", "divergence"], "saturation", "divergence"),
    ):  # fmt: skip
        assert Watch("t", monitored(stop_on=stop_on), saturated).stop == on_saturation
        assert Watch("t", monitored(stop_on=stop_on), diverged).stop == on_divergence
    assert said(caplog) == [], "of steps done before"
    watch = Watch("t", monitored(stop_on=["saturation"]), [], quiet=True)
    look(watch, saturated)
    assert said(caplog) == []
    (message,) = watch.warnings
    assert message.endswith("length_normalize: true; stops here, because stop_on names saturation")


@pytest.fixture
def saturating(tmp_path: Path, tiny_model: Path) -> Bench:
    """Groups that any training tells apart at once."""
    groups = {name: ([5, 6, n], [[7, 9, 0], [8, 4, 0]], [0, 1]) for n, name in enumerate("abcd")}
    return Bench(tmp_path, tiny_model, groups)


SATURATING = {"max_steps": 60, "learning_rate": 0.01, "beta": 50.0, "batch_size": 2}


@pytest.mark.slow
def test_a_saturated_training_ends_and_is_complete(saturating: Bench, caplog: pytest.LogCaptureFixture) -> None:
    whole = saturating.train("cpo", **SATURATING)
    (message,) = [message for message in said(caplog) if "saturated" in message]
    first = int(message.partition("step ")[2].partition(":")[0])
    assert first < 59
    losses = [row["preference_loss"] for row in metrics(whole)][: first + 1]
    assert max(losses[-10:]) < 1e-3 <= max(losses[-11:-1])
    ended = saturating.train("cpo", stop_on=["saturation"], **SATURATING)
    rows = pq.read_table(ended.path / METRICS_FILE).to_pylist()
    assert ended.path != whole.path
    assert [row["step"] for row in rows] == [*range(first + 1), first + 1]
    assert rows[-1]["repetition"] is not None, "measured after the last step"
    # The same weights as a training of so many steps.
    short = saturating.train("cpo", **{**SATURATING, "max_steps": first + 1})
    assert (ended.path / "model.safetensors").read_bytes() == (short.path / "model.safetensors").read_bytes()
    assert f"- steps: {first + 1} of 60; a monitor of `stop_on` ended it" in (ended.path / "README.md").read_text()
    # A limit that is not reached changes nothing.
    other = saturating.train("cpo", stop_on=["divergence"], **SATURATING)
    assert (other.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_a_training_stopped_after_its_monitor_spoke_takes_no_more_steps(
    saturating: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SATURATING, "stop_on": ["saturation"], "keep": "best", "validation": 1, "eval_steps": 5}
    expected = metrics(saturating.train("cpo", **settings))
    other = Bench(tmp_path / "other", saturating.model.path, saturating.candidates)
    monkeypatch.setattr(Loop, "_keep_best", lambda self, metrics: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        other.train("cpo", **settings)
    monkeypatch.undo()
    found = metrics(other.train("cpo", **settings))
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
