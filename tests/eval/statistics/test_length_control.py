import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from cpo_pipe.eval.statistics.bootstrap import Bootstrap, Estimate
from cpo_pipe.eval.statistics.length_control import MIN_EXAMPLES, PENALTY, length_controlled

Values = NDArray[np.float64]
BOOTSTRAP = Bootstrap(resamples=200, seed=0)


def logistic(x: float | Values) -> Values:
    return 1 / (1 + np.exp(-np.asarray(x)))


def judge(
    gain: float | Values, bias: float, longer: float, n: int = 1000, seed: int = 0, ties: float = 0.2
) -> tuple[Values, Values]:
    """Outcomes and length differences, under a judge that likes length by `bias` and quality by `gain` (log odds)."""
    random = np.random.default_rng(seed)
    lengths = np.rint(random.normal(longer, 100, n))
    won = random.random(n) < logistic(gain + bias * np.tanh(lengths / lengths.std(ddof=1)))
    return np.where(random.random(n) < ties, 0.5, won), lengths


def controlled(outcomes: Values, longer: Values) -> Estimate:
    rate = length_controlled(outcomes, longer, BOOTSTRAP)
    assert rate is not None
    assert rate.low is not None
    assert rate.high is not None
    return rate


def contains(rate: Estimate, truth: float) -> bool:
    assert rate.low is not None
    assert rate.high is not None
    return rate.low <= truth <= rate.high


@pytest.mark.parametrize("longer", [-80, 80])
def test_a_planted_liking_for_length_is_taken_out(longer: float) -> None:
    outcomes, lengths = judge(0, 2, longer)
    raw = outcomes.mean()
    assert abs(raw - 0.5) > 0.1  # two equal systems, one of them longer
    rate = controlled(outcomes, lengths)
    assert abs(rate.value - 0.5) < 0.04
    assert contains(rate, 0.5)
    assert not contains(rate, raw)


def test_a_better_system_of_the_same_length_keeps_its_rate() -> None:
    outcomes, lengths = judge(1, 0, 0)
    rate = controlled(outcomes, lengths)
    assert rate.value == pytest.approx(outcomes.mean(), abs=0.01)
    assert rate.value > 0.65


def test_a_better_and_longer_system_keeps_what_is_not_length() -> None:
    outcomes, lengths = judge(1, 2, 80, ties=0)
    rate = controlled(outcomes, lengths)
    assert contains(rate, float(logistic(1)))
    assert rate.value < outcomes.mean() - 0.05


def test_better_systems_have_higher_rates() -> None:
    rates = [controlled(*judge(gain, 2, 80, n=500)).value for gain in (-1.5, 0, 1.5)]
    assert all(low + 0.05 < high for low, high in itertools.pairwise(rates))


def test_the_fit_is_that_of_statsmodels() -> None:
    models = pytest.importorskip("statsmodels.api")
    outcomes, lengths = judge(0.5, 1.5, 60, n=300)
    design = np.stack([np.ones(300), np.tanh(lengths / lengths.std(ddof=1))], axis=1)
    fitted = models.GLM(outcomes, design, family=models.families.Binomial()).fit()
    expected = float(logistic(fitted.params[0]))
    assert abs(expected - outcomes.mean()) > 0.05
    assert controlled(outcomes, lengths).value == pytest.approx(expected, abs=1e-3)  # which has no penalty at all


def test_only_the_coefficient_of_the_length_is_penalized() -> None:
    scipy_optimize = pytest.importorskip("scipy.optimize")
    lengths = np.random.default_rng(0).permutation(200) - 100.0
    outcomes = (lengths > 3).astype(float)  # separable: without a penalty there is no finite fit
    x = np.tanh(lengths / lengths.std(ddof=1))

    def loss(beta: Values) -> float:
        z = beta[0] + beta[1] * x
        return float(np.sum(np.logaddexp(0, z) - outcomes * z) + PENALTY / 2 * beta[1] ** 2)

    found = scipy_optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    assert controlled(outcomes, lengths).value == pytest.approx(float(logistic(found[0])), abs=1e-4)


def test_systems_near_one_half_stay_distinct() -> None:
    # Raw win rates of 49, 44, 48 and 48 of 100; the judge does not look at lengths.
    lengths = np.random.default_rng(0).permutation(200) - 99.5
    rates = []
    for wins in (98, 88, 96, 96):
        outcomes = np.random.default_rng(1).permutation(np.repeat([1.0, 0.0], [wins, 200 - wins]))
        rates.append(controlled(outcomes, lengths).value)
    assert rates == pytest.approx([0.49, 0.44, 0.48, 0.48], abs=0.01)
    assert rates[1] < rates[2] - 0.03 < rates[0] - 0.035


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_systems_gives_one_minus_the_rate(seed: int) -> None:
    outcomes, lengths = judge(0.4, 1.5, 70, n=200, seed=seed, ties=0.3)
    rate, swapped = controlled(outcomes, lengths), controlled(1 - outcomes, -lengths)
    assert swapped.value == pytest.approx(1 - rate.value, abs=1e-9)
    assert (swapped.low, swapped.high) == pytest.approx((1 - (rate.high or 0), 1 - (rate.low or 0)), abs=1e-9)


def test_a_tie_is_half_a_win_and_half_a_loss() -> None:
    outcomes, lengths = judge(0.4, 1.5, 70, n=200, ties=0.3)
    halves = np.concatenate([np.ceil(outcomes), np.floor(outcomes)])
    assert (outcomes == 0.5).any()
    twice = controlled(halves, np.tile(lengths, 2))
    x = controlled(np.tile(outcomes, 2), np.tile(lengths, 2))
    assert twice.value == pytest.approx(x.value, abs=1e-9)


@pytest.mark.slow
def test_the_interval_is_as_wide_as_the_rate_varies_from_sample_to_sample_and_covers_the_truth() -> None:
    rates = [controlled(*judge(0.5, 1, 50, n=150, seed=seed)) for seed in range(16)]
    widths = [(rate.high or 0) - (rate.low or 0) for rate in rates]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std([rate.value for rate in rates], ddof=1), rel=0.35)
    truth = 0.2 * 0.5 + 0.8 * float(logistic(0.5))
    assert sum(contains(rate, truth) for rate in rates) >= 13  # of 16 at 95%, fewer come once in 140 times


def test_of_a_judge_that_sees_nothing_but_length_the_interval_says_that_nothing_is_left() -> None:
    lengths = np.random.default_rng(0).normal(80, 100, 1000)
    outcomes = (lengths > 0).astype(float)
    raw = BOOTSTRAP.rate(outcomes)
    assert raw.value > 0.7
    rate = controlled(outcomes, lengths)
    assert contains(rate, 0.5)
    assert not contains(rate, raw.value)
    assert (rate.high or 0) - (rate.low or 0) > 2 * ((raw.high or 0) - (raw.low or 0))


@pytest.mark.parametrize("wins", [49, 44, 90])
def test_outputs_of_equal_lengths_have_the_raw_win_rate(wins: int) -> None:
    outcomes = np.repeat([1.0, 0.5, 0.0], [wins, 2, 200 - wins - 2])
    assert controlled(outcomes, np.zeros(200)) == BOOTSTRAP.rate(outcomes)
    assert controlled(outcomes, np.zeros(200)).value == (wins + 1) / 200


def test_where_all_is_tied_the_interval_allows_for_rare_wins() -> None:
    rate = controlled(np.full(200, 0.5), np.arange(200) - 100.0)
    assert rate.value == 0.5
    assert rate.low is not None
    assert rate.low < 0.5 < (rate.high or 0)


def test_a_system_that_nearly_always_writes_more_has_no_rate_at_equal_length() -> None:
    outcomes, lengths = judge(0, 1, 0, n=200)
    longer = lengths - np.sort(lengths)[29] + 1e-6  # on 29 of 200 examples it writes less
    assert length_controlled(outcomes, longer, BOOTSTRAP) is None
    assert length_controlled(outcomes, -longer, BOOTSTRAP) is None
    assert length_controlled(outcomes, np.full(200, 40.0), BOOTSTRAP) is None
    assert length_controlled(outcomes, longer - 2e-6, BOOTSTRAP) is not None, "on 30 of 200"


def test_too_few_examples_or_wins_give_no_rate() -> None:
    outcomes, lengths = judge(0, 1, 0, n=MIN_EXAMPLES)
    assert length_controlled(outcomes[1:], lengths[1:], BOOTSTRAP) is None
    rare = np.zeros(MIN_EXAMPLES)
    rare[:9] = 1
    assert length_controlled(rare, lengths, BOOTSTRAP) is None
    assert length_controlled(1 - rare, lengths, BOOTSTRAP) is None


def test_the_seed_decides_the_interval() -> None:
    outcomes, lengths = judge(0, 1, 0, n=200)
    one, other = (Bootstrap(resamples=200, seed=seed) for seed in (1, 2))
    assert length_controlled(outcomes, lengths, one) == length_controlled(outcomes, lengths, one)
    assert length_controlled(outcomes, lengths, one) != length_controlled(outcomes, lengths, other)
