"""The warnings: each on a case made for it, and not on a healthy neighbour."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.models.model import checkpoint_model
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.loop import Loop
from cpo_pipe.trainer.monitors import DROP, NOISE, REPETITION, RISE, SATURATED, WINDOW, Watch, repetition
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Training
from tests.support.training import CANDIDATES, Bench, metrics, said


@pytest.fixture(autouse=True)
def _all_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="cpo_pipe")


# ── while it trains ──────────────────────────────────────────────────────────────────────────────────────────────────


def config(objective: str = "cpo", **settings: Any) -> Training:
    reference = {} if objective in ("mle", "pss", "slic") else {"reference": "m"}
    return OBJECTIVES.parse({"init": "m", "objective": objective, **reference, **settings})


def watching(metrics: Sequence[dict[str, Any]] = (), objective: str = "cpo") -> Watch:
    return Watch("t", config(objective), metrics)


def drops(*values: float, first: int = 0, loss: float = 1.0) -> list[dict[str, float]]:
    return [
        {"step": first + number, "target_drop_per_token": value, "loss": loss} for number, value in enumerate(values)
    ]


def repetitions(*values: float | None) -> list[dict[str, Any]]:
    return [{"step": number, "repetition": value} for number, value in enumerate(values)]


def look(watch: Watch, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        watch.step(row)


def test_a_falling_target_is_said_on_average_over_ten_steps(caplog: pytest.LogCaptureFixture) -> None:
    assert (DROP, WINDOW) == (0.5, 10)
    look(watching(), drops(0.0, *[0.5] * 30))
    assert said(caplog) == [], "not more than the threshold"
    look(watching(), drops(0.0, *[9.0] * 8))
    assert said(caplog) == [], "not yet ten steps"
    look(watching(), drops(*[-0.5, 1.5] * 20))
    assert said(caplog) == [], "ups and downs around it"
    watch = watching()
    look(watch, drops(*[0.0] * 5, *[1.0] * 5))
    assert said(caplog) == []
    look(watch, drops(1.0, first=10))
    (message,) = said(caplog)
    assert "train t, step 10: the target's own log-prob is 0.60 nats per token below the reference's" in message


def test_a_falling_target_is_said_again_at_every_doubling_only(caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    heard = []
    for step in range(4000):
        watch.step({"step": step, "target_drop_per_token": 0.001 * step, "loss": 1.0})
        heard += [(step, message) for message in said(caplog)]
    # The mean over the last ten steps is that of four and a half steps ago.
    assert [step for step, _ in heard] == [505, 1005, 2005]
    look(watch, drops(*[0.0] * 20, *[3.9] * 20))
    assert said(caplog) == [], "it was told before that it was as bad"


def test_a_fall_by_several_doublings_at_once_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = watching()
    look(watch, drops(0.0, *[30.0] * 40))
    assert len(said(caplog)) == 1
    look(watch, drops(*[math.inf] * 20))
    assert len(said(caplog)) == 1, "even what is beyond all doublings is said, and said once"


def test_a_rising_target_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    look(watching(), drops(*[-5.0] * 50))
    assert said(caplog) == []


def test_rising_repetition_is_said_once_and_against_the_first_measurement(caplog: pytest.LogCaptureFixture) -> None:
    assert REPETITION == 0.2
    look(watching(), repetitions(0.25, None, 0.45, 0.1, 0.45))
    assert said(caplog) == [], "not by more than the threshold"
    look(watching(), repetitions(0.9, 0.95, 1.0))
    assert said(caplog) == [], "it did not begin with the training"
    watch = watching()
    look(watch, repetitions(0.25, None, None, 0.46))
    (message,) = said(caplog)
    assert "step 3: 46% of the 4-grams in greedy samples are repetitions, at first it was 25%" in message
    look(watch, repetitions(0.9, 0.2, 1.0))
    assert said(caplog) == []


def test_a_resumed_training_does_not_repeat_what_was_said_and_forgets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    told: list[dict[str, Any]] = [
        {**drop, **rep} for drop, rep in zip(drops(0.0, *[0.7] * 11), repetitions(0.0, *[None] * 10, 0.5), strict=True)
    ]
    look(watching(), told)
    assert len(said(caplog)) == 2
    again = watching(told)
    assert said(caplog) == [], "what the steps before the stop showed was said then"
    look(again, [{"step": 12, "target_drop_per_token": 0.7, "loss": 1.0, "repetition": 0.9}])
    assert said(caplog) == []
    look(again, drops(*[1.5] * 9, first=13))
    (message,) = said(caplog)
    assert "nats per token below" in message, "the next doubling is news"
    # The mean goes over the stop, and so does the baseline of repetition.
    before = [{**row, "repetition": 0.0} if row["step"] == 0 else row for row in drops(0.0, *[0.7] * 8)]
    cut = watching(before)
    look(cut, [{"step": 9, "target_drop_per_token": 0.7, "loss": 1.0, "repetition": 0.3}])
    assert len(said(caplog)) == 2


ROSE = "lower learning_rate, raise beta or set max_grad_norm"
FLAT = "so nothing was gained; lower learning_rate, or raise beta or mle_weight"
FELL = ("it rewards the order of the candidates, not a likely target; lower learning_rate, or raise beta or "
        "mle_weight, to keep the target likely")  # fmt: skip


@pytest.mark.parametrize("objective", ["cpo", "cpo-ranked", "dpo", "apo-zero"])
@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ((0.5, 4829.0), f"the loss rose from 0.5 to 4829; {ROSE}"),
        ((2.0, 2.21), f"the loss rose from 2 to 2.21; {ROSE}"),
        ((2.0, 2.19), f"the loss went from 2 to 2.19, {FLAT}"),
        ((2.0, 2.0), f"the loss went from 2 to 2, {FLAT}"),
        ((2.0, 1.81), f"the loss went from 2 to 1.81, {FLAT}"),
        ((2.0, 1.79), f"the loss fell from 2 to 1.79: {FELL}"),
    ],
)
def test_the_advice_on_a_falling_target_is_true_of_the_loss(
    caplog: pytest.LogCaptureFixture, objective: str, losses: tuple[float, float], advice: str
) -> None:
    watch = watching(objective=objective)
    look(watch, [*drops(0.0, loss=losses[0]), *drops(*[0.1] * 10, *[3.0] * 2, first=1, loss=losses[1])])
    (message,) = [message for message in said(caplog) if "nats per token" in message]
    assert "step 12: the target's own log-prob is 0.68 nats per token below the reference's" in message
    assert message.endswith(f"and at the first step it was 0.00: {advice}")


@pytest.mark.parametrize("objective", ["apo-down", "slic", "mle", "pss"])
def test_what_lowers_the_target_on_purpose_or_has_no_reference_is_not_warned_of(
    caplog: pytest.LogCaptureFixture, objective: str
) -> None:
    rows = drops(0.0, *[9.0] * 30, loss=1.0)
    if objective != "apo-down":  # these have no such figure
        rows = [{"step": row["step"], "loss": row["loss"]} for row in rows]
    look(watching(objective=objective), rows)
    assert said(caplog) == []


def test_a_target_that_is_below_the_reference_from_the_start_is_no_fall(caplog: pytest.LogCaptureFixture) -> None:
    # As where the policy starts from another model.
    look(watching(), drops(*[2.0] * 5, *[1.0] * 30))
    look(watching(), drops(*[2.0] * 5, *[2.4] * 30))
    assert said(caplog) == []
    look(watching(), drops(2.0, *[2.4] * 9, *[2.7] * 4))
    (message,) = said(caplog)
    assert "is 2.52 nats per token below the reference's, and at the first step it was 2.00: " in message
    # One that starts above the reference has fallen only once it is below.
    look(watching(), drops(-2.0, *[0.4] * 30))
    assert said(caplog) == []


@pytest.mark.parametrize("objective", ["cpo", "cpo-ranked", "dpo", "slic", "apo-zero", "apo-down", "mle", "pss"])
def test_the_advice_on_repetition_names_settings_of_the_objective(
    caplog: pytest.LogCaptureFixture, objective: str
) -> None:
    look(watching(objective=objective), repetitions(0.0, 0.9))
    (message,) = said(caplog)
    assert "the model begins to loop; lower learning_rate or train for fewer steps" in message
    has_it = "mle_weight" in type(config(objective)).model_fields
    assert ("mle_weight" in message) == (has_it and objective != "apo-down")


def test_a_training_that_diverges_is_told_so(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # What one group prefers the other rejects: each step makes the next one's loss larger.
    both = {"a": ([5, 6], [[7, 9, 0], [8, 4, 0]], [0, 1]), "b": ([5, 6], [[8, 4, 0], [7, 9, 0]], [0, 1])}
    rows = metrics(
        Bench(tmp_path, tiny_model, both).train("dpo", max_steps=10, batch_size=1, learning_rate=0.3, beta=1.0)
    )
    loss = [row["loss"] for row in rows]
    assert np.median(loss) > 3 * loss[0], loss
    messages = [message for message in said(caplog) if "nats per token below the reference's" in message]
    assert messages
    assert all("the loss rose from 0.6931 to " in message for message in messages)
    assert not any("fell" in message for message in messages)


def test_a_training_warns_in_its_log(tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    # From a model that knows the targets by heart, a large learning rate leads down.
    bench = Bench(tmp_path, tiny_model, CANDIDATES | {f"alone{n}": ([3, n], [[5, 0]], [0]) for n in range(2)})
    bench.model = checkpoint_model("m", bench.train("mle", max_steps=30, learning_rate=0.01))
    said(caplog)
    rows = metrics(bench.train("cpo", max_steps=25, learning_rate=0.03, beta=0.1))
    drop = [row["target_drop_per_token"] for row in rows]
    assert drop[0] == pytest.approx(0, abs=1e-5)
    # By hand, over each ten steps, what Watch should have said.
    expected, limit = 0, DROP
    for end in range(WINDOW, len(drop) + 1):
        mean = sum(drop[end - WINDOW : end]) / WINDOW
        expected += mean > limit
        while mean > limit:
            limit *= 2
    assert expected, drop
    messages = said(caplog)
    assert sum("nats per token below the reference's" in message for message in messages) == expected
    assert sum("33% of the groups have no negative left" in message for message in messages) == 1


# ── saturation and divergence ────────────────────────────────────────────────────────────────────────────────────────


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
    look(Watch("t", config(mle_weight=0.5, length_normalize=True, beta=0.1), []), zeros)
    (message,) = said(caplog)
    assert "so only the MLE loss is left; with beta 0.0005 instead of 0.1" in message
    assert "length_normalize" not in message
    look(watching(objective="slic"), zeros)
    (message,) = said(caplog)
    assert message.endswith("stop earlier, or use negatives that are harder to tell from the target")


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
        assert Watch("t", config(stop_on=stop_on), saturated).stop == on_saturation
        assert Watch("t", config(stop_on=stop_on), diverged).stop == on_divergence
    assert said(caplog) == [], "of steps done before"
    watch = Watch("t", config(stop_on=["saturation"]), [], quiet=True)
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


# ── repetition ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("samples", "share"),
    [
        ([], 0),
        ([[1, 2, 3]], 0),  # no 4-gram at all
        ([[1, 2, 3, 4]], 0),
        ([[1, 1, 1, 1]], 0),
        ([[1, 1, 1, 1, 1]], 1 / 2),
        ([[7] * 13], 9 / 10),
        ([[1, 2, 3, 4, 1, 2, 3, 4]], 1 / 5),  # 1234 2341 3412 4123 1234
        ([[1, 2, 1, 2, 1, 2, 1]], 2 / 4),  # 1212 2121 1212 2121
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0),  # what another sample said is no repetition
        ([[5] * 5, [1, 2, 3, 4, 5, 6, 7], []], 1 / 6),  # over all samples, not a mean of theirs
    ],
)
def test_repetition_by_hand(samples: list[list[int]], share: float) -> None:
    assert repetition(samples) == pytest.approx(share)
