import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cpo_pipe.eval.statistics.significance import examples_needed, holm, sign_flip_p

OUTCOMES = np.array([1, 0.5, 0])


def draw_outcomes(n: int, shares: tuple[float, float, float], seed: int) -> NDArray[np.float64]:
    """Outcomes of `n` examples that are won, tied and lost with these chances."""
    return np.random.default_rng(seed).choice(OUTCOMES, size=n, p=shares)


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


def test_flipped_signs_by_hand() -> None:
    # Sums of ±1 ±½: 3/2, 1/2, −1/2, −3/2; two of the four are as far from 0 as 3/2. A difference of 0 changes nothing.
    assert sign_flip_p([1, 0.5]) == pytest.approx(1 / 2)
    assert sign_flip_p([1, 0, 0.5, 0]) == pytest.approx(1 / 2)
    assert sign_flip_p([0, 0]) == 1
    assert sign_flip_p([-1] * 10) == pytest.approx(2 / 2**10)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_signs_agree_with_scipys_enumeration(seed: int) -> None:
    differences = np.random.default_rng(seed).choice([-1, -0.75, -0.5, 0, 0.25, 0.5, 1], size=12)
    exact = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2**12)
    assert sign_flip_p(differences) == pytest.approx(exact.pvalue)


def test_flipped_signs_without_ties_are_mcnemars_exact_test() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    random = np.random.default_rng(0)
    one, two = random.random(300) < 0.55, random.random(300) < 0.45
    counts = [[np.sum(one & two), np.sum(one & ~two)], [np.sum(~one & two), np.sum(~one & ~two)]]
    assert sign_flip_p(one.astype(float) - two) == pytest.approx(tables.mcnemar(counts, exact=True).pvalue)
    # Against a baseline's 0.5 it is the sign test.
    assert sign_flip_p(one - 0.5) == pytest.approx(stats.binomtest(int(one.sum()), 300).pvalue)


def test_equal_systems_are_called_different_5_times_in_100() -> None:
    p_values = np.array(
        [
            sign_flip_p(draw_outcomes(300, (0.2, 0.6, 0.2), seed) - draw_outcomes(300, (0.2, 0.6, 0.2), 2000 + seed))
            for seed in range(2000)
        ]
    )
    assert 0.035 <= np.mean(p_values < 0.05) <= 0.06  # ± 3 standard errors; the exact test errs on the lower side


def test_thousands_of_examples_are_no_matter_for_the_test() -> None:
    differences = draw_outcomes(7506, (0.4, 0.3, 0.3), 0) - draw_outcomes(7506, (0.3, 0.3, 0.4), 1)
    z = differences.sum() / np.sqrt(np.sum(differences**2))
    assert sign_flip_p(differences) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=0.05)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.04 times 3, 2, 1 are 0.03, 0.04, 0.04; a later one is never below an earlier one.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.03, 0.031, 0.9, 0.8]) == pytest.approx([0.12, 0.12, 1, 1])
    assert holm([0.2]) == [0.2]


def test_holm_is_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = np.random.default_rng(0).random(30) ** 3
    np.testing.assert_allclose(holm(p_values.tolist()), multitest.multipletests(p_values, method="holm")[1])
