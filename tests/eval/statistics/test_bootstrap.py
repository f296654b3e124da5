import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cpo_pipe.eval.statistics.bootstrap import Bootstrap, Estimate, share

BOOTSTRAP = Bootstrap(resamples=2000, seed=0)
OUTCOMES = np.array([1, 0.5, 0])


def draw_outcomes(n: int, shares: tuple[float, float, float], seed: int) -> NDArray[np.float64]:
    """Outcomes of `n` examples that are won, tied and lost with these chances."""
    return np.random.default_rng(seed).choice(OUTCOMES, size=n, p=shares)


def test_ties_count_half() -> None:
    # 3 won, 2 tied, 5 lost: win rate (3 + 2/2) / 10.
    compared = BOOTSTRAP.compare([1] * 3 + [0.5] * 2 + [0] * 5)
    assert (compared.win.value, compared.tie.value, compared.loss.value) == (0.3, 0.2, 0.5)
    assert compared.rate.value == pytest.approx(0.4)
    assert compared.rate.n == 10


def test_the_interval_is_the_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=400)
    draws = np.random.default_rng(2).integers(400, size=(20_000, 400))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])

    estimate = Bootstrap(resamples=20_000, seed=0).mean(values)

    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(low, abs=0.004)  # ± two standard errors of a 2.5% quantile here
    assert estimate.high == pytest.approx(high, abs=0.004)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "shares"),
    [(50, (0.3, 0.4, 0.3)), (100, (0.1, 0.2, 0.7)), (300, (0.45, 0.1, 0.45)), (300, (0.05, 0.05, 0.9))],
)
def test_intervals_of_win_rates_cover_the_truth_93_to_97_times_in_100(
    n: int, shares: tuple[float, float, float]
) -> None:
    truth, samples = float(OUTCOMES @ shares), 1000  # of which 0.7 in 100 is the standard error
    covered = 0
    for seed in range(samples):
        rate = Bootstrap(resamples=500, seed=seed).compare(draw_outcomes(n, shares, seed)).rate
        assert rate.low is not None
        assert rate.high is not None
        covered += rate.low <= truth <= rate.high
    assert 0.93 <= covered / samples <= 0.97


@pytest.mark.slow
def test_intervals_of_paired_differences_cover_the_truth_93_to_97_times_in_100() -> None:
    # Both systems fare well on the same examples: intervals of two unpaired means would be far too wide.
    covered, samples = 0, 1000
    for seed in range(samples):
        random = np.random.default_rng(seed)
        easy = random.random(200) < 0.5
        chances = np.where(easy, 0.8, 0.1)
        one, two = random.random(200) < chances + 0.1, random.random(200) < chances
        estimate = Bootstrap(resamples=500, seed=seed).difference(one.astype(float), two.astype(float))
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.1 <= estimate.high
    assert 0.93 <= covered / samples <= 0.97


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("chance", [0.05, 0.3])
def test_intervals_of_shares_cover_the_truth_exactly_as_often_as_they_should(n: int, chance: float) -> None:
    # No simulation: the chance of each count, where its interval has the truth in it.
    covered = 0.0
    for count in range(n + 1):
        estimate = share([True] * count + [False] * (n - count))
        assert estimate.low is not None
        assert estimate.high is not None
        covered += stats.binom.pmf(count, n, chance) * (estimate.low <= chance <= estimate.high)
    assert 0.93 <= covered <= 0.97


def test_wilsons_interval_is_that_of_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for count, n in ((0, 12), (3, 40), (200, 200)):
        expected = proportion.proportion_confint(count, n, 0.05, "wilson")
        estimate = share([1.0] * count + [0.0] * (n - count))
        assert (estimate.low, estimate.high) == pytest.approx(expected)
        assert (estimate.value, estimate.n) == (count / n, n)


def test_what_never_happened_may_yet_happen() -> None:
    # By hand: Wilson's upper end at 0 of n is z² / (n + z²).
    z2 = stats.norm.ppf(0.975) ** 2
    assert share([0] * 20).high == pytest.approx(z2 / (20 + z2))
    # All won, all lost: the win rate may be as far from its end as the share of wins, of losses may.
    rare = z2 / (20 + z2)
    for outcome, low, high in ((1.0, 1 - rare, 1.0), (0.0, 0.0, rare), (0.5, 0.5 - rare / 2, 0.5 + rare / 2)):
        rate = BOOTSTRAP.compare([outcome] * 20).rate
        assert (rate.value, rate.low, rate.high) == pytest.approx((outcome, low, high))


def test_a_ratio_keeps_an_examples_two_numbers_together() -> None:
    tokens = np.random.default_rng(0).integers(1, 100, 200)
    estimate = BOOTSTRAP.ratio(2.0 * tokens, tokens)
    assert (estimate.value, estimate.low, estimate.high) == (2, 2, 2)
    assert BOOTSTRAP.ratio([1, 2], [1, 3]).value == pytest.approx(3 / 4)  # not the mean of 1 and 2/3


def test_the_seed_decides_the_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert BOOTSTRAP.mean(values) == BOOTSTRAP.mean(values)
    assert BOOTSTRAP.mean(values) != Bootstrap(resamples=2000, seed=1).mean(values)


def test_one_example_has_no_interval() -> None:
    estimate = BOOTSTRAP.mean([0.25])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.25, None, None, 1)


def test_constant_values_have_an_interval_of_no_width() -> None:
    estimate = BOOTSTRAP.mean([1.0, 1.0, 1.0])
    assert (estimate.low, estimate.high) == (1, 1)


def test_a_difference_is_the_bootstrap_of_the_differences() -> None:
    one, two = draw_outcomes(200, (0.4, 0.3, 0.3), 0), draw_outcomes(200, (0.3, 0.3, 0.4), 1)
    found, expected = BOOTSTRAP.difference(one, two), BOOTSTRAP.mean(one - two)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    # Alike on all 20: (1 + 0) / 2 everywhere, so a half ± half of Wilson's rest, twice.
    same, rare = BOOTSTRAP.difference(one[:20], one[:20]), 1 - (share([1] * 20).low or 0)
    assert (same.value, same.low, same.high) == pytest.approx((0, -rare, rare))


def test_the_exponential_takes_its_interval_along() -> None:
    assert Estimate(1, 0, 2, 7).exp() == Estimate(math.e, 1, pytest.approx(math.e**2), 7)
    assert Estimate(0, None, None, 1).exp() == Estimate(1, None, None, 1)
