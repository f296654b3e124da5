from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.eval.judges.base import Winner
from cpo_pipe.eval.statistics.agreement import AGREEMENT, agreement, agreements
from cpo_pipe.eval.statistics.bootstrap import Bootstrap

BOOTSTRAP = Bootstrap(resamples=2000, seed=0)


def agree(one: Sequence[Winner | None], other: Sequence[Winner | None], examples: Sequence[int] = ()) -> dict[str, Any]:
    """Each pair is of an example of its own, unless said otherwise."""
    found = agreement(one, other, examples or range(len(one)), BOOTSTRAP)
    assert found is not None
    return found


def verdicts(seed: int, n: int = 400) -> list[Winner]:
    return np.random.default_rng(seed).choice(["a", "tie", "b"], size=n, p=[0.5, 0.2, 0.3]).tolist()


def test_kappa_by_hand() -> None:
    # The same in 7 of 10. One says a 5, b 4, tie 1; the other a 6, b 3, tie 1: chance (30 + 12 + 1) / 100 = 0.43, and
    # kappa (0.7 − 0.43) / (1 − 0.43).
    one: list[Winner | None] = ["a"] * 5 + ["b"] * 4 + ["tie"]
    other: list[Winner | None] = ["a"] * 4 + ["b"] + ["a"] * 2 + ["b"] * 2 + ["tie"]
    found = agree(one, other)
    assert found["agreement"] == pytest.approx(0.7)
    assert found["kappa"] == pytest.approx(0.27 / 0.57)
    assert found["n"] == 10


def test_kappa_is_scikit_learns_and_so_is_its_bootstrap() -> None:
    from sklearn.metrics import cohen_kappa_score

    random, one = np.random.default_rng(0), np.array(verdicts(1))
    other = np.where(random.random(400) < 0.6, one, np.array(verdicts(2)))
    found = agree(one.tolist(), other.tolist())
    assert found["kappa"] == pytest.approx(cohen_kappa_score(one, other))
    draws = random.integers(400, size=(400, 400))
    low, high = np.percentile([cohen_kappa_score(one[draw], other[draw]) for draw in draws], [2.5, 97.5])
    assert (found["kappa_low"], found["kappa_high"]) == pytest.approx((low, high), abs=0.015)


def test_judges_that_know_nothing_of_each_other_have_no_kappa_to_speak_of() -> None:
    found = agree(verdicts(1), verdicts(2))
    assert found["agreement"] > 0.3
    assert found["kappa_low"] < 0 < found["kappa_high"]


def test_full_agreement_and_full_disagreement() -> None:
    one = verdicts(1)
    found = agree(one, one)
    assert (found["agreement"], found["kappa"]) == (1, 1)
    opposed = agree(["a", "b"] * 50, ["b", "a"] * 50)
    assert (opposed["agreement"], opposed["kappa"]) == (0, -1)


def test_one_verdict_everywhere_may_be_chance() -> None:
    found = agree(["a"] * 30, ["a"] * 30)
    assert found["agreement"] == 1
    assert found["kappa"] is None


def test_few_pairs_may_lack_a_verdict_in_a_resample() -> None:
    found = agree(["a", "a", "a", "b"], ["a", "a", "a", "b"])
    # All resamples agree, too; that is no interval of no width.
    assert (found["kappa"], found["kappa_low"], found["kappa_high"]) == (1, None, None)


def test_intervals_are_over_examples_not_over_pairs() -> None:
    # Ten systems' outputs for a prompt that are judged alike say no more than one does.
    one, other = verdicts(1, 60), verdicts(2, 60)
    alone = agree(one, other)
    repeated = agree(one * 10, other * 10, [*range(60)] * 10)
    assert repeated["n"] == 600
    assert repeated["agreement"] == pytest.approx(alone["agreement"])
    assert (repeated["kappa_low"], repeated["kappa_high"]) == pytest.approx((alone["kappa_low"], alone["kappa_high"]))
    assert repeated["ci_low"] == pytest.approx(alone["ci_low"], abs=0.02)
    independent = agree(one * 10, other * 10)
    assert independent["ci_low"] > repeated["ci_low"] + 0.05


def test_examples_that_all_agree_leave_room_for_others() -> None:
    assert agree(["a", "b"] * 20, ["a", "b"] * 20, [n // 2 for n in range(40)])["ci_low"] == pytest.approx(
        0.8389, abs=1e-4
    )


def test_only_pairs_that_both_judged_count() -> None:
    found = agree(["a", None, "b", "tie"], ["a", "b", None, "b"])
    assert (found["agreement"], found["n"]) == (0.5, 2)
    assert agreement(["a", None], [None, "b"], [0, 1], BOOTSTRAP) is None


def test_every_two_judges_have_a_row() -> None:
    rows = agreements({"x": ["a", "a", None], "y": ["a", "b", "b"], "z": [None, None, "tie"]}, [0, 1, 2], BOOTSTRAP)
    assert [(row["judge_a"], row["judge_b"], row["agreement"], row["n"]) for row in rows] == [
        ("x", "y", 0.5, 2),
        ("y", "z", 0.0, 1),
    ]
    assert pa.Table.from_pylist(rows, schema=AGREEMENT)["kappa"].to_pylist() == pytest.approx([0.0, 0.0])
