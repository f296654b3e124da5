"""Means, ratios and win rates over examples, each with its 95% percentile bootstrap interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
BATCH_ELEMENTS = 1 << 22
"""Values resampled at once: bounds the bootstrap's memory, not its result."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure over examples. The interval is None where one example cannot give one."""

    value: float
    low: float | None
    high: float | None
    n: int
    """Examples."""


@dataclass(frozen=True)
class WinRate:
    """How often a system wins, ties and loses against a baseline, as shares of the examples."""

    win: Estimate
    tie: Estimate
    loss: Estimate
    rate: Estimate
    """Wins and half of the ties."""


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Resampling of whole examples: an example's numerator and denominator stay together."""

    resamples: int
    seed: int

    def mean(self, values: Sequence[float] | Values) -> Estimate:
        """The mean over examples."""
        return self._estimate(lambda sample, axis=-1: np.mean(sample, axis=axis), np.asarray(values, np.float64))

    def ratio(self, numerators: Sequence[float] | Values, denominators: Sequence[float] | Values) -> Estimate:
        """Sum by sum over examples, such as nats by tokens."""
        return self._estimate(
            lambda top, bottom, axis=-1: np.sum(top, axis=axis) / np.sum(bottom, axis=axis),
            np.asarray(numerators, np.float64),
            np.asarray(denominators, np.float64),
        )

    def compare(self, outcomes: Sequence[float] | Values) -> WinRate:
        """Win, tie and loss of outcomes that are 1 (won), 0.5 (tied) or 0 (lost), one per example."""
        scores = np.asarray(outcomes, np.float64)
        win, tie, loss = (self.mean((scores == outcome).astype(np.float64)) for outcome in (1, 0.5, 0))
        return WinRate(win, tie, loss, self.mean(scores))

    def _estimate(self, statistic: Callable[..., Any], *samples: Values) -> Estimate:
        n = len(samples[0])
        value = float(statistic(*samples))
        if n < 2:
            return Estimate(value, None, None, n)
        from scipy.stats import bootstrap

        interval = bootstrap(
            samples,
            statistic,
            n_resamples=self.resamples,
            batch=max(1, BATCH_ELEMENTS // n),
            vectorized=True,
            paired=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(
                self.seed % (1 << 32)
            ),  # the same resamples for every figure: differences are not noise
        ).confidence_interval
        return Estimate(value, float(interval.low), float(interval.high), n)
