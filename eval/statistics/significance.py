"""Tests of differences between systems, Holm's adjustment for several tests, and the examples that a test needs."""

import math
from collections.abc import Sequence

import numpy as np

from cpo_pipe.eval.statistics.bootstrap import Values

SIGNIFICANCE = 0.05
POWER = 0.8

RESAMPLES = 9999
"""Random exchanges of `permutation_p`, whose smallest value is therefore 0.0002 (two-sided)."""

OUTCOME_STEP = 0.25
"""Outcomes are multiples of this: a win is 1, a tie 0.5, and two orders of one pair may be averaged."""


def sign_flip_p(differences: Sequence[float] | Values) -> float:
    """Return the two-sided p of paired differences of outcomes under "neither system is better".

    This is the exact paired permutation test. If the systems are equally good, an example's outcomes can be exchanged,
    which flips the sign of the difference; p is the share of all 2^n exchanges whose mean is at least as far from 0 as
    the observed one. It tests the mean that is reported. Equal outcomes change nothing. A win against a tie counts half
    of a win against a loss; McNemar's test has no ties, and Wilcoxon's ranks would blur the two. Without ties it is
    McNemar's exact test; for outcomes minus 0.5 it is the sign test of a win rate against 0.5.

    Args:
        differences: multiples of OUTCOME_STEP.
    """
    from scipy.stats import binom

    steps = np.asarray(differences, np.float64) / OUTCOME_STEP
    signed = np.rint(steps).astype(np.int64)
    assert np.allclose(steps, signed)
    # Of `count` examples that differ by `size` steps, k positive ones add size · (2k − count) to the sum.
    chances = np.ones(1)
    for size, count in zip(*np.unique(np.abs(signed[signed != 0]), return_counts=True), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spread)
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(signed.sum())].sum()))


def permutation_p(differences: Sequence[float] | Values, seed: int) -> float:
    """Return the two-sided p of paired differences of any values, by exchanging the systems on each example.

    As `sign_flip_p`, with RESAMPLES random exchanges in place of all.

    Args:
        differences: one per example.
        seed: of the exchanges.
    """
    from scipy.stats import permutation_test

    values = np.asarray(differences, np.float64)
    if not values.any():
        return 1.0
    test = permutation_test(
        (values,), np.mean, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for multiple testing, in their order (Holm 1979).

    Rejecting all hypotheses whose adjusted value is below 0.05 rejects any true one with a probability below 0.05.
    """
    order = np.argsort(p_values)
    factors = len(order) - np.arange(len(order))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, np.float64)[order]))
    values: list[float] = adjusted.tolist()
    return values


def examples_needed(difference: float, sd: float) -> int | None:
    """Return the number of examples that detects a true mean difference (two-sided p < 0.05) with a power of 0.8.

    None where nothing varied: such a sample says nothing about the number.

    n = ((z_0.975 + z_0.8) · sd / difference)², the normal approximation, which is two too low at n ≈ 30.

    Args:
        difference: of the means; for win rates 0.05 is five points.
        sd: standard deviation of the paired differences, example by example.
    """
    from scipy.stats import norm

    if sd == 0:
        return None
    z = norm.ppf(1 - SIGNIFICANCE / 2) + norm.ppf(POWER)
    return max(2, math.ceil((z * sd / difference) ** 2))
