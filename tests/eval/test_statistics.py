import numpy as np
import pytest

from cpo_pipe.eval.statistics import Bootstrap

BOOTSTRAP = Bootstrap(resamples=2000, seed=0)


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


def test_intervals_cover_the_truth_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        estimate = Bootstrap(resamples=500, seed=0).mean(random.random(120) < 0.3)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.91 <= covered / 300 <= 0.98  # binomial: 0.95 ± 3 × 0.0126


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
