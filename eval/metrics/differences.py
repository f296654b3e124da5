"""Differences between systems in the metric that ranks them, where it is no win rate: of means, or of diversity."""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.eval.metrics.figures import Figures
from cpo_pipe.eval.metrics.text import Texts, distinct_n, jackknife, leave_one_out, n_grams
from cpo_pipe.eval.statistics.significance import holm, permutation_p

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
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(compared(values, baseline, fingerprints), 2):
        differences = values[a] - values[b]
        estimate = figures.bootstrap.mean(differences)
        rows.append({
            "metric": metric, "decoding": decoding, "system_a": a, "system_b": b, "difference": estimate.value,
            "ci_low": estimate.low, "ci_high": estimate.high, "p": permutation_p(differences, figures.bootstrap.seed),
            "n": estimate.n, "n_needed": None,
        })  # fmt: skip
    adjusted = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


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
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(compared(outputs, baseline, fingerprints), 2):
        gain = _nearer(distinct_n(outputs[a], n), distinct_n(outputs[b], n), target)
        without = _nearer(leave_one_out(outputs[a], n), leave_one_out(outputs[b], n), targets_without)
        low, high = jackknife(float(gain), without)
        rows.append({
            "metric": metric, "decoding": decoding, "system_a": a, "system_b": b, "difference": float(gain),
            "ci_low": low, "ci_high": high, "p": _permutation_p(outputs[a], outputs[b], n, target, seed),
            "n": len(truth), "n_needed": None,
        })  # fmt: skip
    adjusted = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


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
