"""Intervals and tests of distinct n-grams: against naive computations, and by simulation."""

import itertools

import numpy as np
import pytest

from cpo_pipe.eval.metrics.differences import diversity_differences
from cpo_pipe.eval.metrics.text import distinct_estimate, distinct_n

Texts = list[list[int]]


def texts(seed: int, vocabulary: int, count: int = 40, length: int = 12) -> Texts:
    drawn: Texts = np.random.default_rng(seed).integers(0, vocabulary, (count, length)).tolist()
    return drawn


def naive_interval(of: Texts, n: int) -> tuple[float, float]:
    without = np.array([distinct_n(of[:i] + of[i + 1 :], n) for i in range(len(of))])
    error = np.sqrt((len(of) - 1) * without.var())
    return distinct_n(of, n) - 1.959964 * error, distinct_n(of, n) + 1.959964 * error


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_interval_is_that_of_leaving_each_text_out(n: int) -> None:
    of = [*texts(0, 9), [], [1], [1, 1, 1, 1]]
    found = distinct_estimate(of, n)
    assert found.value == distinct_n(of, n)
    assert (found.low, found.high) == pytest.approx(naive_interval(of, n), rel=1e-6)


def test_the_interval_covers_what_samples_vary() -> None:
    # Of 200 samples from one source, the interval of each against the mean of all.
    made = [texts(seed, 30, count=60) for seed in range(200)]
    mean = np.mean([distinct_n(one) for one in made])
    found = [distinct_estimate(one, 2) for one in made]
    assert 0.9 <= np.mean([one.low <= mean <= one.high for one in found]) <= 0.99  # type: ignore[operator]


def rows(outputs: dict[str, Texts], truth: Texts, **fingerprints: str) -> list[dict]:
    prints = {name: name for name in outputs} | fingerprints
    return diversity_differences("distinct-2", "top-k", outputs, truth, "mle", prints, seed=0)


def test_the_system_that_is_nearer_gains() -> None:
    truth = texts(1, 20)
    found = rows({"mle": texts(2, 5), "cpo": texts(3, 15), "wild": texts(4, 10_000)}, truth)
    assert [(row["system_a"], row["system_b"]) for row in found] == [("cpo", "wild"), ("cpo", "mle"), ("wild", "mle")]
    by_hand = {name: abs(distinct_n(of) - distinct_n(truth)) for name, of in
               {"mle": texts(2, 5), "cpo": texts(3, 15), "wild": texts(4, 10_000)}.items()}  # fmt: skip
    for row in found:
        assert row["difference"] == pytest.approx(by_hand[row["system_b"]] - by_hand[row["system_a"]])
        assert row["ci_low"] < row["difference"] < row["ci_high"]
    (cpo,) = (row for row in found if (row["system_a"], row["system_b"]) == ("cpo", "mle"))
    assert cpo["p"] == pytest.approx(0.001)
    assert cpo["p_holm"] == pytest.approx(0.003)


def test_too_much_diversity_is_no_gain() -> None:
    (row,) = rows({"mle": texts(2, 20), "cpo": texts(3, 10_000)}, texts(1, 20))
    assert row["difference"] < 0
    assert row["p"] == pytest.approx(0.001)


def test_p_is_that_of_all_exchanges() -> None:
    a, b, truth = texts(5, 6, count=8, length=5), texts(6, 9, count=8, length=5), texts(7, 12, count=8, length=5)

    def gain(x: Texts, y: Texts) -> float:
        return abs(distinct_n(y) - distinct_n(truth)) - abs(distinct_n(x) - distinct_n(truth))

    observed, extreme = gain(a, b), 0
    for swaps in itertools.product([False, True], repeat=8):
        x = [two if swap else one for one, two, swap in zip(a, b, swaps, strict=True)]
        y = [one if swap else two for one, two, swap in zip(a, b, swaps, strict=True)]
        extreme += abs(gain(x, y)) >= abs(observed) - 1e-12
    (row,) = rows({"a": a, "mle": b}, truth)
    assert row["p"] == pytest.approx(extreme / 256, abs=4 * np.sqrt(0.25 / 999))


@pytest.mark.slow
def test_equal_systems_are_rarely_told_apart() -> None:
    decided = [rows({"cpo": texts(100 + s, 15), "mle": texts(900 + s, 15)}, texts(s, 20))[0]["p"] < 0.05
               for s in range(30)]  # fmt: skip
    assert np.mean(decided) <= 0.15


def test_a_model_under_two_names_is_compared_once() -> None:
    of = texts(3, 15)
    found = rows({"mle": texts(2, 5), "cpo": of, "mix@1": of}, texts(1, 20), **{"mix@1": "cpo"})
    assert [(row["system_a"], row["system_b"]) for row in found] == [("cpo", "mle")]
