"""Differences between systems in win rates, and in the metric that ranks them: of means, or of diversity.

The rows of a metric are one table of the report: one for every two systems, with Holm's adjustment over all of them.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpo_pipe.eval.metrics.figures import Figures
from cpo_pipe.eval.metrics.text import Texts, distinct_n, jackknife, leave_one_out, n_grams
from cpo_pipe.eval.metrics.wins import OUTCOME, comparison_metrics
from cpo_pipe.eval.statistics.bootstrap import Estimate
from cpo_pipe.eval.statistics.significance import examples_needed, holm, permutation_p, sign_flip_p

NOTICEABLE = 0.05
"""`n_needed` is the number of examples that detects this difference of win rates."""

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

PERMUTATIONS = 999
"""Random exchanges of two systems' outputs; the smallest p is 0.001."""


def compared(systems: Collection[str], baseline: str, fingerprints: Mapping[str, str]) -> list[str]:
    """Return the systems to compare, the baseline last; of those with one model only one."""
    models: dict[str, str] = {}
    for name in [baseline, *fingerprints]:
        if name in systems:
            models.setdefault(fingerprints.get(name, name), name)
    others = [name for name in models.values() if name != baseline]
    return [*others, baseline] if baseline in systems else others


def win_differences(
    figures: Figures, judge: str, decodings: Iterable[str], baseline: str, fingerprints: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the differences between a judge's win rates against the baseline (COMPARISONS schema).

    Two systems are compared by their outcomes against the baseline on the same examples; the baseline ties with itself.
    Holm's adjustment is over all pairs and decodings.

    Args:
        figures: where the outcomes are.
        judge: the judge's name.
        decodings: of the outputs.
        baseline: the system that the others were judged against; last of each pair, so that a positive difference is a
            gain over it.
        fingerprints: the model of each system; of systems with one model (an ensemble at α = 1 is its first model) only
            one is compared.
    """
    metric, rows = comparison_metrics(judge)[-1], []
    for decoding in decodings:
        outcomes = figures.values_of(decoding, metric)
        outcomes[baseline] = np.full(len(figures.example_ids), OUTCOME["tie"])
        for a, b in itertools.combinations(compared(outcomes, baseline, fingerprints), 2):
            differences = outcomes[a] - outcomes[b]
            estimate = figures.bootstrap.difference(outcomes[a], outcomes[b])
            needed = examples_needed(NOTICEABLE, float(differences.std()))
            rows.append(_row(metric, decoding, a, b, estimate, sign_flip_p(differences), needed))
    return _adjusted(rows)


def value_differences(
    figures: Figures, metric: str, decoding: str, baseline: str, fingerprints: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the differences of a metric's means between every two systems, on the same examples (COMPARISONS schema).

    Args:
        figures: where the values are.
        metric: with values per example.
        decoding: of the outputs.
        baseline: last of each pair, so that a positive difference is a gain over it.
        fingerprints: the model of each system; of systems with one model only one is compared.
    """
    values = figures.values_of(decoding, metric)
    rows = []
    for a, b in itertools.combinations(compared(values, baseline, fingerprints), 2):
        differences = values[a] - values[b]
        p = permutation_p(differences, figures.bootstrap.seed)
        rows.append(_row(metric, decoding, a, b, figures.bootstrap.mean(differences), p))
    return _adjusted(rows)


def diversity_differences(
    metric: str, decoding: str, outputs: Mapping[str, Texts], truth: Texts, baseline: str,
    fingerprints: Mapping[str, str], seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return by how much each system is nearer to the ground truth's diversity than another (COMPARISONS schema).

    The difference of a and b is |b − t| − |a − t| of their distinct-n and the targets' t. Its p is that of a
    permutation test: if the systems are equally good, each prompt's two outputs can be exchanged.

    Args:
        metric: distinct-1, distinct-2 or distinct-3.
        decoding: of the outputs.
        outputs: token ids by system, for the same prompts.
        truth: of the targets.
        baseline: last of each pair, so that a positive difference is a gain over it.
        fingerprints: the model of each system; of systems with one model only one is compared.
        seed: of the permutations.
    """
    n = int(metric.removeprefix("distinct-"))
    target, targets_without = distinct_n(truth, n), leave_one_out(truth, n)
    rows = []
    for a, b in itertools.combinations(compared(outputs, baseline, fingerprints), 2):
        gain = _nearer(distinct_n(outputs[a], n), distinct_n(outputs[b], n), target)
        without = _nearer(leave_one_out(outputs[a], n), leave_one_out(outputs[b], n), targets_without)
        low, high = jackknife(float(gain), without)
        p = _permutation_p(outputs[a], outputs[b], n, target, seed)
        rows.append(_row(metric, decoding, a, b, Estimate(float(gain), low, high, len(truth)), p))
    return _adjusted(rows)


def _row(
    metric: str, decoding: str, a: str, b: str, difference: Estimate, p: float, n_needed: int | None = None
) -> dict[str, Any]:
    return {"metric": metric, "decoding": decoding, "system_a": a, "system_b": b, "difference": difference.value,
            "ci_low": difference.low, "ci_high": difference.high, "p": p, "n": difference.n,
            "n_needed": n_needed}  # fmt: skip


def _adjusted(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with Holm's adjustment of their p for all of them."""
    adjusted = holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def _nearer(a: Any, b: Any, truth: Any) -> Any:
    return np.abs(b - truth) - np.abs(a - truth)


def _permutation_p(a: Texts, b: Texts, n: int, truth: float, seed: int) -> float:
    """Return the two-sided p of the gain in nearness under exchanges of the two outputs of each prompt."""
    codes: dict[tuple[int, ...], int] = {}
    coded = [
        [np.array([codes.setdefault(gram, len(codes)) for gram in n_grams(text, n)], np.int64) for text in texts]
        for texts in (a, b)
    ]

    def gain(swapped: NDArray[np.bool_]) -> float:
        shares: list[float] = []
        for one, other in (coded, coded[::-1]):
            grams = np.concatenate([y if swap else x for x, y, swap in zip(one, other, swapped, strict=True)])
            shares.append(len(np.unique(grams)) / max(len(grams), 1))
        return float(_nearer(shares[0], shares[1], truth))

    random = np.random.default_rng(seed)
    observed = abs(gain(np.zeros(len(a), bool)))
    # Rounding must not make an exchange that changes nothing look smaller.
    extreme = sum(abs(gain(random.random(len(a)) < 0.5)) >= observed - 1e-12 for _ in range(PERMUTATIONS))
    return (1 + extreme) / (1 + PERMUTATIONS)
