"""Power analysis: the number of examples that a paired comparison needs, before anything is paid for it."""

import math

SIGNIFICANCE = 0.05
POWER = 0.8


def examples_needed(difference: float, sd: float) -> int:
    """Return the number of examples that detects a true mean difference (two-sided p < 0.05) with a power of 0.8.

    n = ((z_0.975 + z_0.8) · sd / difference)², the normal approximation, which is two too low at n ≈ 30.

    Args:
        difference: of the means; for win rates 0.05 is five points.
        sd: standard deviation of the per-example differences: `outcome_sd` for a system against its baseline; for two
            systems that of their paired differences, which is smaller because the examples' difficulty cancels out.
    """
    from scipy.stats import norm

    z = norm.ppf(1 - SIGNIFICANCE / 2) + norm.ppf(POWER)
    return max(2, math.ceil((z * sd / difference) ** 2))


def outcome_sd(rate: float, ties: float) -> float:
    """Return the standard deviation of outcomes 1, 0.5, 0 with the mean `rate` and this share of ties.

    The share of wins is rate − ties / 2, so that the variance is wins + ties / 4 − rate².
    """
    return math.sqrt(rate - ties / 4 - rate * rate)
