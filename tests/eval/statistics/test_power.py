import math

import numpy as np
import pytest

from cpo_pipe.eval.statistics.power import examples_needed
from cpo_pipe.eval.statistics.tests import sign_flip_p


def outcome_sd(rate: float, ties: float) -> float:
    """Return the standard deviation of outcomes 1, 0.5, 0 with the mean `rate` and this share of ties."""
    return math.sqrt(rate - ties / 4 - rate * rate)


def test_five_points_by_hand() -> None:
    # (1.960 + 0.8416)² = 7.849; (0.5 / 0.05)² = 100.
    assert examples_needed(0.05, 0.5) == 785
    assert examples_needed(-0.05, 0.5) == 785
    assert examples_needed(0.05, 0) is None, "what did not vary says nothing"


@pytest.mark.parametrize(("difference", "ties"), [(0.3, 0.0), (0.1, 0.0), (0.05, 0.3), (0.02, 0.6)])
def test_the_number_is_that_of_statsmodels(difference: float, ties: float) -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    sd = outcome_sd(0.5 + difference, ties)
    expected = power.TTestPower().solve_power(effect_size=difference / sd, alpha=0.05, power=0.8)
    assert expected - 3 <= examples_needed(difference, sd) <= expected + 1


def test_so_many_examples_find_the_difference_four_times_in_five() -> None:
    shares = (0.45, 0.2, 0.35)  # win rate 0.55
    n = examples_needed(0.05, outcome_sd(0.55, 0.2))
    random = np.random.default_rng(0)
    found = [sign_flip_p(random.choice([0.5, 0, -0.5], size=n, p=shares)) < 0.05 for _ in range(1000)]
    assert 0.76 <= np.mean(found) <= 0.84
