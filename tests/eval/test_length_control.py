import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from cpo_pipe.eval.length_control import MIN_EXAMPLES, length_controlled
from cpo_pipe.eval.statistics import Estimate

Values = NDArray[np.float64]


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
    rate = length_controlled(outcomes, longer, 0)
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


def test_the_fit_is_that_of_statsmodels_where_there_is_much_to_learn_from() -> None:
    models = pytest.importorskip("statsmodels.api")
    outcomes, lengths = judge(0.5, 1.5, 60, n=2000)
    design = np.stack([np.ones(2000), np.tanh(lengths / lengths.std(ddof=1))], axis=1)
    fitted = models.GLM(outcomes, design, family=models.families.Binomial()).fit()
    expected = float(logistic(fitted.params[0]))
    assert controlled(outcomes, lengths).value == pytest.approx(expected, abs=0.004)


def test_the_interval_is_as_wide_as_the_rate_varies_from_sample_to_sample() -> None:
    rates = [controlled(*judge(0.5, 1, 50, n=150, seed=seed)) for seed in range(16)]
    widths = [(rate.high or 0) - (rate.low or 0) for rate in rates]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std([rate.value for rate in rates], ddof=1), rel=0.35)


def test_of_a_judge_that_sees_nothing_but_length_the_interval_says_that_nothing_is_left() -> None:
    lengths = np.random.default_rng(0).normal(80, 100, 1000)
    outcomes = (lengths > 0).astype(float)
    assert outcomes.mean() > 0.7
    rate = controlled(outcomes, lengths)
    assert contains(rate, 0.5)
    assert (rate.high or 0) - (rate.low or 0) > 0.3


def test_outputs_of_equal_lengths_keep_the_win_rate() -> None:
    outcomes, _ = judge(1, 0, 0)
    assert controlled(outcomes, np.zeros(1000)).value == pytest.approx(outcomes.mean(), abs=0.01)


def test_a_rate_that_the_penalty_makes_one_half_has_an_interval() -> None:
    # A raw rate of 0.48 on 200 examples: too near to one half for the cross-validation to tell them apart.
    outcomes = np.repeat([1, 0.5, 0], [75, 42, 83])
    rate = controlled(outcomes, np.random.default_rng(0).permutation(200) - 100.0)
    assert rate.value == pytest.approx(0.5, abs=0.02)
    assert contains(rate, 0.48)
    assert contains(rate, 0.5)


def test_too_few_examples_or_wins_give_no_rate() -> None:
    outcomes, lengths = judge(0, 1, 0, n=MIN_EXAMPLES)
    assert length_controlled(outcomes[1:], lengths[1:], 0) is None
    rare = np.zeros(MIN_EXAMPLES)
    rare[:9] = 1
    assert length_controlled(rare, lengths, 0) is None
    assert length_controlled(1 - rare, lengths, 0) is None


def test_the_seed_decides_the_interval() -> None:
    outcomes, lengths = judge(0, 1, 0, n=200)
    one = length_controlled(outcomes, lengths, 1)
    assert one == length_controlled(outcomes, lengths, 1)
    assert one != length_controlled(outcomes, lengths, 2)
