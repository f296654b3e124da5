"""Power analysis: the number of examples that a paired comparison needs."""

import math

SIGNIFICANCE = 0.05
POWER = 0.8


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
