"""How many examples show a difference: the size of a paired comparison, before anything is paid for it."""

import math

SIGNIFICANCE = 0.05
POWER = 0.8


def examples_needed(difference: float, sd: float) -> int:
    """Examples with which a true mean difference is found (two-sided p < 0.05) four times in five.

    n = ((z_0.975 + z_0.8) · sd / difference)², the normal approximation: two more would be needed at n ≈ 30, nobody
    notices them at 300.

    Args:
        difference: of the means; of win rates 0.05 is five points.
        sd: standard deviation of the per-example differences: `outcome_sd` for a system against its baseline; for two
            systems that of their paired differences, which the examples' common difficulty makes smaller.
    """
    from scipy.stats import norm

    z = norm.ppf(1 - SIGNIFICANCE / 2) + norm.ppf(POWER)
    return max(2, math.ceil((z * sd / difference) ** 2))


def outcome_sd(rate: float, ties: float) -> float:
    """Standard deviation of outcomes 1, 0.5, 0 with this mean and this share of ties.

    Of the win rate `rate`, wins are rate − ties / 2: the variance is wins + ties / 4 − rate².
    """
    return math.sqrt(rate - ties / 4 - rate * rate)
