"""Differences between two evaluations of the same systems, paired by example."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cpo_pipe.eval.statistics.bootstrap import Bootstrap, Values
from cpo_pipe.eval.statistics.significance import SIGNIFICANCE, holm, permutation_p

BOOTSTRAP = Bootstrap(resamples=2000, seed=0)

ENOUGH = 30
"""Examples from which Student's t-test replaces the permutation test."""

Key = tuple[str, str, str]
"""System, decoding and metric."""


@dataclass(frozen=True)
class Difference:
    """By how much a metric of one evaluation exceeds that of another."""

    value: float
    low: float | None = None
    """95% bootstrap interval, paired by example; None without values per example."""
    high: float | None = None
    p: float | None = None
    """Two-sided, adjusted (Holm) for all metrics of the comparison."""
    n: int = 0
    """Examples that both evaluations have."""

    @property
    def significant(self) -> bool:
        """Whether p is below 0.05."""
        return self.p is not None and self.p < SIGNIFICANCE


def paired_differences(
    metrics: Mapping[Key, float], others: Mapping[Key, float], values: pa.Table, other_values: pa.Table
) -> dict[Key, Difference]:
    """Return the differences (others minus metrics) of the metrics that two evaluations share.

    Args:
        metrics: of the first evaluation.
        others: of the other.
        values: the first one's values per example (VALUES schema).
        other_values: the other one's.
    """
    firsts, seconds = _by_example(values), _by_example(other_values)
    found: dict[Key, Difference] = {}
    for key in metrics.keys() & others.keys():
        plain = Difference(others[key] - metrics[key])
        one, other = firsts.get(key, {}), seconds.get(key, {})
        common = sorted(one.keys() & other.keys())
        if not common:
            found[key] = plain
            continue
        gains = np.array([other[example] - one[example] for example in common])
        if not gains.any():
            found[key] = Difference(0.0, 0.0, 0.0, None, len(common))  # nothing to test
            continue
        estimate = BOOTSTRAP.mean(gains)
        value = plain.value if one.keys() == other.keys() else estimate.value
        found[key] = Difference(value, estimate.low, estimate.high, _p(gains), len(common))
    tested = [key for key, difference in found.items() if difference.p is not None]
    adjusted = holm([float(found[key].p or 0) for key in tested])
    for key, p in zip(tested, adjusted, strict=True):
        one_of = found[key]
        found[key] = Difference(one_of.value, one_of.low, one_of.high, p, one_of.n)
    return found


def _p(gains: Values) -> float:
    """Return the two-sided p of paired differences that are not all 0.

    From ENOUGH examples on it is that of Student's t-test. Below it is a permutation test, which has no p below 0.0002.
    """
    if len(gains) < ENOUGH:
        return permutation_p(gains, BOOTSTRAP.seed)
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(gains, 0).pvalue) if gains.std() > 0 else 0.0


def _by_example(values: pa.Table) -> dict[Key, dict[str, float]]:
    found: dict[Key, dict[str, float]] = {}
    for row in values.to_pylist():
        key = (row["system"], row["decoding"], row["metric"])
        found.setdefault(key, {})[row["example_id"]] = row["value"]
    return found
