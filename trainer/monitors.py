"""Monitors of a training: each sees the metrics of every step, and warns once it shows a known way of going wrong."""

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from statistics import fmean, median, pvariance
from typing import ClassVar

from cpo_pipe.trainer.objectives.base import StopReason, Training
from cpo_pipe.trainer.objectives.preference import PreferenceTraining, ReferenceTraining

log = logging.getLogger(__name__)

Row = dict[str, float]

WINDOW = 10
"""Steps over which metrics are averaged."""
DROP = 0.5
"""Nats per token that the target's log-prob may fall, below the reference's and since the first step, before a warning;
repeats when the value doubles."""
CHANGE = 0.1
"""Share of the first step's loss by which the median of a window must differ to count as risen or fallen."""
REPETITION = 0.2
"""Rise of the share of repeated 4-grams in greedy samples."""
SATURATED = 1e-3
"""Nats of preference loss below which a window is saturated. The gradient with respect to the rewards is no larger."""
SENSIBLE_MARGIN = 2.0
"""Reward margin at which a suggested β would have put the log-ratios: far from 0 and from saturation."""
RISE = 0.2
"""Share by which the mean loss of a window must exceed the loss at the start to be divergence."""
NOISE = 4.0
"""Standard errors by which it must also exceed it; for accuracies, by which they must be below chance."""
STARTED_ALIKE = 2e-3
"""Nats per token that policy and reference may be apart at step 0 to count as equal models."""


class Monitor(ABC):
    """Watches for one way of going wrong."""

    stops: ClassVar[StopReason | None] = None
    """The reason by which `stop_on` names it."""

    def __init__(self, config: Training):
        self.config = config

    @abstractmethod
    def step(self, row: Row) -> str | None:
        """Add the metrics of one more step; return a warning, without the training's name, once there is one."""


class Watch:
    """All monitors of one training. Their warnings are logged as they arise.

    Args:
        name: of the training, for messages.
        config: its settings.
        metrics: of the steps already done, whose warnings are not repeated.
        quiet: collect warnings, but do not log them.
    """

    def __init__(self, name: str, config: Training, metrics: Sequence[Row], *, quiet: bool = False):
        self._name, self._config = name, config
        self._monitors = [kind(config) for kind in (TargetDrop, Repetition, Saturation, Divergence)]
        self.warnings: list[str] = []
        self.stop: StopReason | None = None
        """The reason of `stop_on` that has shown; None without one."""
        self._quiet = True
        for row in metrics:
            self.step(row)
        self._quiet = quiet

    def step(self, row: Row) -> None:
        """Add the metrics of one more step, and warn if they show a fault."""
        for monitor in self._monitors:
            message = monitor.step(row)
            if message is None:
                continue
            if monitor.stops in self._config.stop_on:
                self.stop = self.stop or monitor.stops
                message += f"; stops here, because stop_on names {monitor.stops}"
            self.warnings.append(f"train {self._name}, step {row['step']:.0f}: {message}")
            if not self._quiet:
                log.warning("%s", self.warnings[-1])


class TargetDrop(Monitor):
    """The target itself becomes less likely than under the reference."""

    def __init__(self, config: Training):
        super().__init__(config)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._drops: deque[float] = deque(maxlen=WINDOW)
        self._first_loss = self._first_drop = 0.0
        self._next = DROP

    def step(self, row: Row) -> str | None:
        """See `Monitor.step`."""
        drop = row.get("target_drop_per_token")
        if drop is None or self.config.lowers_target:
            return None
        if not self._drops:
            self._first_drop, self._first_loss = drop, row["loss"]
        self._drops.append(drop)
        self._losses.append(row["loss"])
        mean = fmean(self._drops)
        # A policy that does not start as its reference may be below it from the start, and rise.
        fall = mean - max(self._first_drop, 0.0)
        if len(self._drops) < WINDOW or not fall > self._next:
            return None
        while self._next < fall:
            self._next *= 2
        return (
            f"the target's own log-prob is {mean:.2f} nats per token below the reference's, and at the first step it "
            f"was {self._first_drop:.2f}: {self._advice(median(self._losses))}"
        )

    def _advice(self, loss: float) -> str:
        """Return how the loss explains a target that gets less likely, and what to change."""
        change = f"from {self._first_loss:.4g} to {loss:.4g}"
        if loss > self._first_loss * (1 + CHANGE):
            return f"the loss rose {change}; lower learning_rate, raise beta or set max_grad_norm"
        if loss < self._first_loss * (1 - CHANGE):
            return (f"the loss fell {change}: it rewards the order of the candidates, not a likely target; "
                    "lower learning_rate, or raise beta or mle_weight, to keep the target likely")  # fmt: skip
        return f"the loss went {change}, so nothing was gained; lower learning_rate, or raise beta or mle_weight"


class Repetition(Monitor):
    """Greedy samples repeat themselves more than at the start."""

    def __init__(self, config: Training):
        super().__init__(config)
        self._first: float | None = None
        self._warned = False

    def step(self, row: Row) -> str | None:
        """See `Monitor.step`."""
        share = row.get("repetition")
        if share is None:
            return None
        if self._first is None:
            self._first = share
        if self._warned or share <= self._first + REPETITION:
            return None
        self._warned = True
        # An MLE loss would work against an objective that lowers the target.
        has_mle = isinstance(self.config, PreferenceTraining) and not self.config.lowers_target
        return (
            f"{100 * share:.0f}% of the 4-grams in greedy samples are repetitions, at first it was "
            f"{100 * self._first:.0f}%: the model begins to loop; lower learning_rate or train for fewer steps"
            + (", or raise mle_weight" if has_mle else "")
        )


class Saturation(Monitor):
    """The preference loss is 0 up to rounding, so its gradient is, too: further steps change nothing."""

    stops = "saturation"

    def __init__(self, config: Training):
        super().__init__(config)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._margins: deque[float] = deque(maxlen=WINDOW)
        self._warned = False

    def step(self, row: Row) -> str | None:
        """See `Monitor.step`."""
        loss = row.get("preference_loss", math.nan)
        if self._warned or math.isnan(loss):  # NaN: of a batch without negatives
            return None
        self._losses.append(abs(loss))
        self._margins.append(row["reward_margin"])
        if len(self._losses) < WINDOW or not max(self._losses) < SATURATED:
            return None
        self._warned = True
        still = "only the MLE loss is left" if getattr(self.config, "mle_weight", 0) else "it learns nothing more"
        return (
            f"the preference loss is saturated: it was below {SATURATED:g} in the last {WINDOW} steps "
            f"(reward margin {median(self._margins):.3g}), so {still}; {self._advice(median(self._margins))}"
        )

    def _advice(self, margin: float) -> str:
        if not isinstance(self.config, ReferenceTraining) or margin <= 0:
            return "stop earlier, or use negatives that are harder to tell from the target"
        suggested = self.config.beta * SENSIBLE_MARGIN / margin
        normalize = "" if self.config.length_normalize else ", or set length_normalize: true"
        return (
            f"with beta {suggested:.1g} instead of {self.config.beta:g} the log-ratios seen would give a margin of "
            f"about {SENSIBLE_MARGIN:g}: lower beta{normalize}"
        )


class Divergence(Monitor):
    """The loss rises above its start, or the target wins against its negatives less often than by chance.

    The loss of a policy that starts as its reference begins at a constant, without noise; of others the first window
    is compared. A policy that has hardly moved (as in warm-up) has rewards near 0 and an accuracy that means nothing,
    so the mean margin must be negative, too.
    """

    stops = "divergence"

    def __init__(self, config: Training):
        super().__init__(config)
        self._first: list[float] = []
        self._alike = False
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._accuracies: deque[float] = deque(maxlen=WINDOW)
        self._chances: deque[float] = deque(maxlen=WINDOW)
        self._margins: deque[float] = deque(maxlen=WINDOW)
        self._warned = False

    def step(self, row: Row) -> str | None:
        """See `Monitor.step`."""
        loss = row.get("preference_loss", row.get("loss", math.nan))
        if self._warned or math.isnan(loss):
            return None
        if not self._first:
            self._alike = abs(row.get("target_drop_per_token", math.inf)) < STARTED_ALIKE
        if len(self._first) < (1 if self._alike else WINDOW):
            self._first.append(loss)
            return None
        self._losses.append(loss)
        if isinstance(self.config, ReferenceTraining) and "reward_accuracy" in row:
            self._accuracies.append(row["reward_accuracy"])
            self._chances.append(1 / row["candidates"])
            self._margins.append(row["reward_margin"])
        if len(self._losses) < WINDOW:
            return None
        finding = self._risen() or self._below_chance()
        if finding is None:
            return None
        self._warned = True
        raise_beta = ", raise beta" if isinstance(self.config, ReferenceTraining) else ""
        return f"the training diverges: {finding}; lower learning_rate{raise_beta} or set max_grad_norm"

    def _risen(self) -> str | None:
        start, mean = fmean(self._first), fmean(self._losses)
        noise = math.sqrt(pvariance(self._first) / len(self._first) + pvariance(self._losses) / WINDOW)
        if not mean - start > max(RISE * abs(start), NOISE * noise):
            return None
        return f"the loss rose from {start:.4g} to {mean:.4g} (mean of {WINDOW} steps)"

    def _below_chance(self) -> str | None:
        if not self._accuracies or fmean(self._margins) >= 0:
            return None
        accuracy, chance = fmean(self._accuracies), fmean(self._chances)
        groups = WINDOW * self.config.batch_size
        if not accuracy < chance - NOISE * math.sqrt(chance * (1 - chance) / groups):
            return None
        return (
            f"the target has the highest reward in {100 * accuracy:.0f}% of the groups (mean of {WINDOW} steps), less "
            f"than the {100 * chance:.0f}% of chance"
        )


def repetition(samples: Sequence[Sequence[int]]) -> float:
    """Return the share of 4-grams of token ids that repeat an earlier one of the same sample (rep-4)."""
    repeated = total = 0
    for ids in samples:
        grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0
