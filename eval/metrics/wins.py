"""Win rates of the systems against the baseline, the judges' position bias, and differences between systems."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpo_pipe.eval.generate import Outputs
from cpo_pipe.eval.judges.base import Judgement
from cpo_pipe.eval.metrics.figures import Figures
from cpo_pipe.eval.statistics.bootstrap import share
from cpo_pipe.eval.statistics.length_control import length_controlled
from cpo_pipe.eval.statistics.significance import examples_needed, holm, sign_flip_p

OUTCOME = {"a": 1.0, "tie": 0.5, "b": 0.0}

NOTICEABLE = 0.05
"""`n_needed` is the number of examples that detects this difference of win rates."""

JUDGED = {
    "win": "share of the examples on which the judge prefers the system",
    "tie": "share of the examples on which the judge prefers neither",
    "loss": "share of the examples on which the judge prefers the baseline",
    "win rate": "wins and half of the ties, 0 to 1; above 0.5 is better than the baseline",
    "position bias": "share of the verdicts with a winner that prefer the output shown first; 0.5 is no bias",
    "flip rate": "share of the pairs whose verdict changes with the order in which the outputs are shown",
    "unparseable": "share of the answers that are no verdict; each counts as a tie",
    "length-controlled win rate": "the win rate that a logistic model of outcome and length predicts for equal "
    "length, after AlpacaEval 2.0; needs 100 examples, and is missing if one system writes more on 85% of them",
}
"""A judge's metrics; their names follow the judge's."""

COMPARISONS = pa.schema(
    [
        ("metric", pa.string()),
        ("decoding", pa.string()),
        ("system_a", pa.string()),
        ("system_b", pa.string()),
        ("difference", pa.float64()),  # of the means over the same examples, a minus b
        ("ci_low", pa.float64()),  # 95% bootstrap interval, paired
        ("ci_high", pa.float64()),
        ("p", pa.float64()),  # two-sided, by exchanging a and b on each example
        ("p_holm", pa.float64()),  # adjusted for all rows of the metric
        ("n", pa.int64()),  # examples
        ("n_needed", pa.int64()),  # examples that detect a true difference of NOTICEABLE with a power of 0.8; null for
        # other metrics than win rates, and where nothing varied
    ]
)


def comparison_metrics(judge: str, opponent: str | None = None) -> tuple[str, str, str, str]:
    """Return the names of a judge's shares of wins, ties and losses and of its win rate, in which a tie counts half.

    Args:
        judge: the judge's name.
        opponent: the other system, if it is not the baseline.
    """
    against = f" against {opponent}" if opponent is not None else ""
    return f"{judge} win{against}", f"{judge} tie{against}", f"{judge} loss{against}", f"{judge} win rate{against}"


def length_controlled_metric(judge: str) -> str:
    """Return the name of a judge's win rate at equal length."""
    return f"{judge} length-controlled win rate"


def win_metrics(judges: Iterable[str], opponents: Iterable[str]) -> set[str]:
    """Return the names of the win rates of some judges, against the baseline and other opponents."""
    opponents = [*opponents]
    names = {name for judge in judges for whom in (None, *opponents) for name in comparison_metrics(judge, whom)}
    return names | {length_controlled_metric(judge) for judge in judges}


@dataclass(frozen=True)
class _Contest:
    """A system's results against the baseline, example by example."""

    outcomes: NDArray[np.float64]
    longer: NDArray[np.float64]
    """Characters of the system's output minus the baseline's."""


class WinRates:
    """Adds win rates to figures, and keeps the outcomes against the baseline for the differences between systems."""

    def __init__(self, figures: Figures):
        self._figures = figures
        self._contests: dict[tuple[str, str], dict[str, _Contest]] = {}
        """By judge's name and decoding, then by system."""

    def add(
        self,
        judge: str,
        judgements: Sequence[Judgement],
        system: str,
        decoding: str,
        outputs: Outputs,
        other: Outputs,
        opponent: str | None = None,
    ) -> None:
        """Add how often the judge prefers the system's output, a of each judgement, to the other.

        The other outputs are those of `opponent`; None is the baseline, whose outcomes are kept for `compare`.
        """
        outcomes = [OUTCOME[judgement.winner] for judgement in judgements]
        shares = self._figures.bootstrap.compare(outcomes)
        names = comparison_metrics(judge, opponent)
        for name, estimate in zip(names, (shares.win, shares.tie, shares.loss, shares.rate), strict=True):
            self._figures.add(system, decoding, name, estimate)
        self._figures.keep(system, decoding, names[-1], outcomes)
        if opponent is None:
            longer = [len(a) - len(b) for a, b in zip(outputs.texts, other.texts, strict=True)]
            contests = self._contests.setdefault((judge, decoding), {})
            contests[system] = _Contest(np.array(outcomes, np.float64), np.array(longer, np.float64))

    def add_order(self, judge: str, system: str, decoding: str, judgements: Sequence[Judgement]) -> None:
        """Add how far a judge depends on the order in which it is shown outputs, over the examples that tell.

        Position bias: the share of the verdicts with a winner that prefer the output shown first; 0.5 is no bias.
        Flip rate: the share of the pairs whose verdict changes with the order. Unparseable: the share of the answers
        that contain no verdict.
        """
        named = [judgement.for_first for judgement in judgements if judgement.for_first[1]]
        if named:
            first, winners = zip(*named, strict=True)
            bias = self._figures.bootstrap.ratio(first, winners)
            self._figures.add(system, decoding, f"{judge} position bias", bias)
        if flipped := [judgement.flipped for judgement in judgements if judgement.flipped is not None]:
            self._figures.add(system, decoding, f"{judge} flip rate", share(flipped))
        if unread := [judgement.unparseable for judgement in judgements if judgement.unparseable is not None]:
            mean = self._figures.bootstrap.mean(unread)
            self._figures.add(system, decoding, f"{judge} unparseable", mean)

    def compare(self, baseline: str, fingerprints: Mapping[str, str]) -> pa.Table:
        """Add the length-controlled win rates, and return the differences between the win rates (COMPARISONS schema).

        Two systems are compared by their outcomes against the baseline on the same examples; the baseline ties with
        itself. Of systems with one fingerprint (an ensemble at α = 1 is its first model) only one is compared. Holm's
        adjustment is over all pairs and decodings of a judge, which are one table of the report.

        Args:
            baseline: the system that the others were judged against.
            fingerprints: the model of each system.
        """
        first = {fingerprint: system for system, fingerprint in reversed([*fingerprints.items()])}
        if baseline in fingerprints:
            first[fingerprints[baseline]] = baseline
        for (judge, decoding), contests in self._contests.items():
            for system, contest in contests.items():
                rate = length_controlled(contest.outcomes, contest.longer, self._figures.bootstrap)
                if rate is not None:
                    self._figures.add(system, decoding, length_controlled_metric(judge), rate)
        rows: list[dict[str, Any]] = []
        for judge in dict.fromkeys(judge for judge, _ in self._contests):
            pairs = [
                pair
                for (name, decoding), contests in self._contests.items()
                if name == judge
                for pair in self._differences(
                    comparison_metrics(judge)[-1],
                    decoding,
                    {system: contest for system, contest in contests.items() if first[fingerprints[system]] == system},
                    baseline,
                )
            ]
            adjusted = holm([pair["p"] for pair in pairs])
            rows += [pair | {"p_holm": p} for pair, p in zip(pairs, adjusted, strict=True)]
        return pa.Table.from_pylist(rows, schema=COMPARISONS)

    def _differences(
        self, metric: str, decoding: str, contests: Mapping[str, _Contest], baseline: str
    ) -> list[dict[str, Any]]:
        """Return a row per two systems; the baseline is last, so that a positive difference is a gain over it."""
        outcomes = {name: contest.outcomes for name, contest in contests.items()}
        outcomes[baseline] = np.full(len(self._figures.example_ids), OUTCOME["tie"])
        rows = []
        for (a, of_a), (b, of_b) in itertools.combinations(outcomes.items(), 2):
            differences = of_a - of_b
            estimate = self._figures.bootstrap.difference(of_a, of_b)
            rows.append({
                "metric": metric, "decoding": decoding, "system_a": a, "system_b": b, "difference": estimate.value,
                "ci_low": estimate.low, "ci_high": estimate.high, "p": sign_flip_p(differences), "n": estimate.n,
                "n_needed": examples_needed(NOTICEABLE, float(differences.std())),
            })  # fmt: skip
        return rows
