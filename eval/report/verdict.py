"""The answer of an evaluation: the best system against the baseline, whether that is decided, and what it costs."""

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import pyarrow as pa

from cpo_pipe.eval.config import DIVERSITY, GROUND_TRUTH
from cpo_pipe.eval.metrics.figures import ANY_DECODING
from cpo_pipe.eval.metrics.wins import length_controlled_metric
from cpo_pipe.eval.statistics.significance import SIGNIFICANCE, holm

COSTS = {"target NLL": "nats per token", "length": "tokens"}
"""Metrics that a gain may cost, with their units."""


def percent(share: float) -> int:
    """Return a share in whole percent. Halves are rounded up, so that 64.5% and its 14.5 above 50% are 65 and 15."""
    return math.floor(round(100 * share, 6) + 0.5)


def _digits(value: float) -> str:
    """Return a value with three significant digits."""
    return f"{value:#.3g}".removesuffix(".")


@dataclass(frozen=True)
class Cost:
    """What else differs between the best system and the baseline."""

    metric: str
    value: float
    baseline: float

    def __str__(self) -> str:
        return f"{self.metric} {_digits(self.value)} against {_digits(self.baseline)} {COSTS[self.metric]}"


@dataclass(frozen=True)
class Verdict:
    """How the best system compares with the baseline, in the metric that ranks systems."""

    metric: str
    decoding: str
    system: str
    baseline: str
    value: float
    baseline_value: float
    """One half of a win rate."""
    truth: float | None
    """The ground truth's value, of a metric in which the nearer system is better."""
    difference: float
    """Of the values; with `truth` by how much the system is nearer to it. Positive is better."""
    low: float | None
    """95% interval of the difference."""
    high: float | None
    p: float
    """Of this difference, adjusted (Holm) for the number of systems that were compared with the baseline."""
    systems: int
    """How many these are."""
    costs: tuple[Cost, ...]
    controlled: tuple[float, float, float] | None = None
    """The length-controlled win rate with its 95% interval; None where it is not measured."""
    shared: bool = False
    """Whether the metric uses the embedding model that ranked the negatives."""

    @property
    def decided(self) -> bool:
        """Whether the difference is significant."""
        return self.p < SIGNIFICANCE

    @property
    def headline(self) -> str:
        """The answer without figures."""
        if not self.decided:
            return f"Undecided: the best system, {self.system}, does not differ significantly from {self.baseline}"
        if self.difference > 0 and self.truth is not None:
            return f"{self.system} comes nearer to the ground truth than {self.baseline}"
        if self.difference > 0:
            return f"{self.system} is better than {self.baseline}"
        return f"No system is better than {self.baseline}; the best other one, {self.system}, is worse"

    @property
    def figures(self) -> str:
        """The figures of the answer."""
        interval = "" if self.low is None else f" [{self._signed(self.low)}, {self._signed(self.high or 0.0)}]"
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        p += f" adjusted for {self.systems} systems" if self.systems > 1 else ""
        gain = f"{self._signed(self.difference)}{interval}"
        if self.truth is not None:
            gain = f"the ground truth has {self._shown(self.truth)}; nearer by {gain}"
        return (
            f"{self.metric} of {self.system} under {self.decoding} {self._shown(self.value)} against "
            f"{self._shown(self.baseline_value)}, {gain}, {p}"
        )

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        costs = f"; {', '.join(map(str, self.costs))}" if self.costs else ""
        return f"{self.headline}: {self.figures}{costs}.{self.caution}"

    @property
    def caution(self) -> str:
        """What else must be known to believe the answer; empty where there is nothing."""
        parts = []
        if self.controlled is not None:
            rate, low, high = self.controlled
            parts.append(f" At equal length {percent(rate)}% [{percent(low)}, {percent(high)}].")
        if self.shared:
            parts.append(" The embedding model of this metric also ranked the negatives, which favors what was trained "
                         "on that ranking: look at the other metrics, too.")  # fmt: skip
        return "".join(parts)

    def _shown(self, value: float) -> str:
        return f"{percent(value)}%" if self.metric.endswith("win rate") else _digits(value)

    def _signed(self, value: float) -> str:
        return f"{percent(value):+d}" if self.metric.endswith("win rate") else f"{value:+.2g}"


def verdict(
    metrics: pa.Table,
    comparisons: pa.Table,
    baseline: str,
    metric: str,
    decoding: str,
    shared_metrics: AbstractSet[str] = frozenset(),
) -> Verdict | None:
    """Return the verdict; None if no system was compared with the baseline.

    Args:
        metrics: METRICS schema.
        comparisons: COMPARISONS schema.
        baseline: the system that the others are compared with.
        metric: what ranks the systems.
        decoding: of the outputs.
        shared_metrics: metrics of the embedding model that also ranked the negatives.
    """
    rows = [
        row
        for row in comparisons.to_pylist()
        if (row["metric"], row["decoding"], row["system_b"]) == (metric, decoding, baseline)
    ]
    if not rows:
        return None
    adjusted = holm([row["p"] for row in rows])
    number = max(range(len(rows)), key=lambda one: rows[one]["difference"])
    best = rows[number]
    system, is_rate = best["system_a"], metric.endswith("win rate")
    found = {
        (row["system"], row["metric"]): row
        for row in metrics.to_pylist()
        if row["decoding"] in (decoding, ANY_DECODING)
    }
    values = {key: row["value"] for key, row in found.items()}
    controlled = found.get((system, length_controlled_metric(metric.removesuffix(" win rate"))))
    costs = tuple(
        Cost(cost, values[system, cost], values[baseline, cost])
        for cost in COSTS
        if (system, cost) in values and (baseline, cost) in values
    )
    return Verdict(
        metric, decoding, system, baseline, values[system, metric],
        0.5 if is_rate else values[baseline, metric], values[GROUND_TRUTH, metric] if metric in DIVERSITY else None,
        best["difference"], best["ci_low"], best["ci_high"], adjusted[number], len(rows),
        () if baseline == GROUND_TRUTH else costs,
        (controlled["value"], controlled["ci_low"], controlled["ci_high"]) if controlled else None,
        metric in shared_metrics,
    )  # fmt: skip
