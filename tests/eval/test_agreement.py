import numpy as np
import pytest

from cpo_pipe.eval.agreement import agreement
from cpo_pipe.eval.statistics import Bootstrap

BOOTSTRAP = Bootstrap(resamples=2000, seed=0)


def verdicts(seed: int, n: int = 400) -> list[str]:
    return np.random.default_rng(seed).choice(["a", "tie", "b"], size=n, p=[0.5, 0.2, 0.3]).tolist()


def test_kappa_by_hand() -> None:
    # The same in 7 of 10. One says a 5, b 4, tie 1; the other a 6, b 3, tie 1: chance (30 + 12 + 1) / 100 = 0.43, and
    # kappa (0.7 − 0.43) / (1 − 0.43).
    one = ["a"] * 5 + ["b"] * 4 + ["tie"]
    other = ["a"] * 4 + ["b"] + ["a"] * 2 + ["b"] * 2 + ["tie"]
    found = agreement(one, other, BOOTSTRAP)
    assert found.raw.value == pytest.approx(0.7)
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(0.27 / 0.57)
    assert found.kappa.n == 10


def test_kappa_is_scikit_learns_and_so_is_its_bootstrap() -> None:
    from sklearn.metrics import cohen_kappa_score

    random, one = np.random.default_rng(0), np.array(verdicts(1))
    other = np.where(random.random(400) < 0.6, one, np.array(verdicts(2)))
    kappa = agreement(one.tolist(), other.tolist(), BOOTSTRAP).kappa
    assert kappa is not None
    assert kappa.value == pytest.approx(cohen_kappa_score(one, other))
    draws = random.integers(400, size=(400, 400))
    low, high = np.percentile([cohen_kappa_score(one[draw], other[draw]) for draw in draws], [2.5, 97.5])
    assert (kappa.low, kappa.high) == pytest.approx((low, high), abs=0.015)


def test_judges_that_know_nothing_of_each_other_have_no_kappa_to_speak_of() -> None:
    found = agreement(verdicts(1), verdicts(2), BOOTSTRAP)
    assert found.raw.value > 0.3
    assert found.kappa is not None
    assert found.kappa.low is not None
    assert found.kappa.high is not None
    assert found.kappa.low < 0 < found.kappa.high


def test_full_agreement_and_full_disagreement() -> None:
    one = verdicts(1)
    found = agreement(one, one, BOOTSTRAP)
    assert found.kappa is not None
    assert (found.raw.value, found.kappa.value) == (1, 1)
    opposed = agreement(["a", "b"] * 50, ["b", "a"] * 50, BOOTSTRAP)
    assert opposed.kappa is not None
    assert (opposed.raw.value, opposed.kappa.value) == (0, -1)


def test_one_verdict_everywhere_may_be_chance() -> None:
    found = agreement(["a"] * 30, ["a"] * 30, BOOTSTRAP)
    assert found.raw.value == 1
    assert found.kappa is None


def test_few_pairs_may_lack_a_verdict_in_a_resample() -> None:
    kappa = agreement(["a", "a", "a", "b"], ["a", "a", "a", "b"], BOOTSTRAP).kappa
    assert kappa is not None
    assert (kappa.low, kappa.high) == (1, 1)
