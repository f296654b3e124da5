"""Differences between systems in the metric that ranks them, where it is no win rate."""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from cpo_pipe.eval.metrics.figures import Figures
from cpo_pipe.eval.statistics.tests import holm, permutation_p


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
