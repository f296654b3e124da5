"""The warnings: each on a case made for it, and not on a healthy neighbour."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpo_pipe.data.models.model import checkpoint_model
from cpo_pipe.trainer.monitors import DROP, REPETITION, WINDOW, repetition
from tests.support.training import CANDIDATES, Bench, look, metrics, monitored, said, watching


@pytest.fixture(autouse=True)
def _all_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="cpo_pipe")


# ── while it trains ──────────────────────────────────────────────────────────────────────────────────────────────────


def drops(*values: float, first: int = 0, loss: float = 1.0) -> list[dict[str, float]]:
    return [
        {"step": first + number, "target_drop_per_token": value, "loss": loss} for number, value in enumerate(values)
    ]


def repetitions(*values: float | None) -> list[dict[str, Any]]:
    return [{"step": number, "repetition": value} for number, value in enumerate(values)]


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
    has_it = "mle_weight" in type(monitored(objective)).model_fields
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
