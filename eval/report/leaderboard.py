"""The ranked table of the systems under one decoding, with the few metrics that tell them apart."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from cpo_pipe.eval.config import DIVERSITY, GROUND_TRUTH
from cpo_pipe.eval.judges.base import ScoreMetric
from cpo_pipe.eval.metrics.figures import ANY_DECODING
from cpo_pipe.eval.report.verdict import percent
from cpo_pipe.eval.statistics.significance import SIGNIFICANCE

DAGGER = " †"
"""Marks metrics of the embedding model that also ranked the negatives."""

COLUMNS = 6
"""Most metrics of a table."""

Direction = Literal["↑", "↓", "≈"]
"""Which values are better: high ones, low ones, or those near the ground truth's."""

ALWAYS: dict[str, Direction] = {
    "chrF": "↑", "MAUVE": "↑", "rep-4": "≈", "distinct-2": "≈", "target NLL": "↓", "length": "≈",
}  # fmt: skip
"""Metrics that no judge makes, by importance."""


@dataclass(frozen=True)
class Cell:
    """A system's value in one metric."""

    text: str
    """The value, in percent for win rates; – without one."""
    value: float | None = None
    low: float | None = None
    """95% interval."""
    high: float | None = None
    best: bool = False
    significant: bool = False
    """Whether the difference to the baseline is (p < 0.05, Holm's adjustment)."""

    @property
    def interval(self) -> str:
        """The interval as text; empty without one."""
        if self.low is None or self.high is None:
            return ""
        if self.text.endswith("%"):
            return f"[{percent(self.low)}, {percent(self.high)}]"
        digits = len(self.text.partition(".")[2])
        return f"[{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Column:
    """A metric."""

    metric: str
    direction: Direction
    title: str
    """Its name, with a dagger where it uses the ranker's embedding model."""
    cells: list[Cell]
    """In the order of the systems."""


@dataclass(frozen=True)
class Leaderboard:
    """The systems under one decoding, the best first and the ground truth last."""

    decoding: str
    systems: list[str]
    columns: list[Column]
    """The metric that ranks first."""


def leaderboards(
    metrics: pa.Table,
    comparisons: pa.Table,
    baseline: str,
    ranked_by: tuple[str, str],
    shared_metrics: AbstractSet[str] = frozenset(),
    score_metrics: Sequence[ScoreMetric] = (),
) -> list[Leaderboard]:
    """Return a table per decoding, first that of the decoding that ranks.

    Args:
        metrics: METRICS schema.
        comparisons: COMPARISONS schema.
        baseline: the system that the others are compared with.
        ranked_by: metric and decoding that rank the systems.
        shared_metrics: metrics of the embedding model that also ranked the negatives.
        score_metrics: the metrics of the judges' scores.
    """
    rows = metrics.to_pylist()
    found = {(row["system"], row["decoding"], row["metric"]): row for row in rows}
    systems = list(dict.fromkeys(row["system"] for row in rows if row["system"] != GROUND_TRUTH))
    decodings = list(dict.fromkeys(row["decoding"] for row in rows if row["decoding"] != ANY_DECODING))
    decodings.sort(key=lambda decoding: decoding != ranked_by[1])
    p_values = {
        (row["metric"], row["decoding"], row["system_a"]): row["p_holm"]
        for row in comparisons.to_pylist()
        if row["system_b"] == baseline
    }
    tables = []
    for decoding in decodings:
        here = {
            (system, metric): row
            for (system, of, metric), row in found.items()
            if of in (decoding, ANY_DECODING)
        }  # fmt: skip

        def rank(system: str, here: Mapping[tuple[str, str], Any] = here) -> float:
            row, truth = (here.get((name, ranked_by[0])) for name in (system, GROUND_TRUTH))
            if row is None:  # the baseline has no win rate against itself
                return -0.5
            value: float = row["value"]
            return abs(value - truth["value"]) if truth is not None and ranked_by[0] in DIVERSITY else -value

        order = [*sorted(systems, key=rank), *([GROUND_TRUTH] if (GROUND_TRUTH, "rep-4") in here else [])]
        columns = [
            Column(metric, direction, metric + (DAGGER if metric in shared_metrics else ""),
                   _cells(metric, direction, order, here, {s: p_values.get((metric, decoding, s), 1.0) for s in order}))
            for metric, direction in _metrics(here, ranked_by[0], score_metrics)
        ]  # fmt: skip
        tables.append(Leaderboard(decoding, order, columns))
    return tables


def _metrics(
    here: Mapping[tuple[str, str], Any], ranking: str, score_metrics: Sequence[ScoreMetric]
) -> Iterator[tuple[str, Direction]]:
    """Yield the metrics of a table, the most important first."""
    measured = list(dict.fromkeys(metric for system, metric in here if system != GROUND_TRUTH))
    rates = [metric for metric in measured if metric.endswith(" win rate") and "length-controlled" not in metric]
    scores = [metric.name for metric in score_metrics if metric.on_terminal]
    names = dict.fromkeys(name for name in (ranking, *rates, *scores, *ALWAYS) if name in measured)
    yield from [(name, "≈" if name in DIVERSITY else ALWAYS.get(name, "↑")) for name in names][:COLUMNS]


def _cells(
    metric: str,
    direction: Direction,
    systems: Sequence[str],
    here: Mapping[tuple[str, str], Mapping[str, Any]],
    p_values: Mapping[str, float],
) -> list[Cell]:
    rows = [here.get((system, metric)) for system in systems]
    truth = here.get((GROUND_TRUTH, metric))
    competing = [row["value"] for system, row in zip(systems, rows, strict=True) if row and system != GROUND_TRUTH]
    best = None
    if len(competing) > 1 and (direction != "≈" or truth is not None):
        loss = {"↑": lambda value: -value, "↓": lambda value: value,
                "≈": lambda value: abs(value - truth["value"]) if truth else 0.0}[direction]  # fmt: skip
        best = min(competing, key=loss)
    return [
        Cell("–") if row is None else
        Cell(_shown(metric, row["value"]), row["value"], row["ci_low"], row["ci_high"],
             system != GROUND_TRUTH and row["value"] == best, p_values[system] < SIGNIFICANCE)
        for system, row in zip(systems, rows, strict=True)
    ]  # fmt: skip


def _shown(metric: str, value: float) -> str:
    if metric.endswith("win rate"):
        return f"{percent(value)}%"
    return f"{value:.1f}" if metric in ("chrF", "length") else f"{value:.3f}"
