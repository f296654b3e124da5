"""Agreement of two judges, or of a judge and humans, on the same pairs."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpo_pipe.eval.judges.base import Winner
from cpo_pipe.eval.statistics.bootstrap import Bootstrap, share

HUMANS = "human annotations"
"""The name of the human annotations among the judges; a judge's name cannot contain a space."""

AGREEMENT = pa.schema(
    [
        ("judge_a", pa.string()),
        ("judge_b", pa.string()),
        ("agreement", pa.float64()),  # share of pairs with the same verdict
        ("ci_low", pa.float64()),  # 95% bootstrap interval, over examples
        ("ci_high", pa.float64()),
        (
            "decided",
            pa.float64(),
        ),  # share with the same verdict of the pairs on which neither says tie; null without any
        ("n_decided", pa.int64()),  # these pairs
        ("ties_a", pa.float64()),  # share of pairs on which each says tie
        ("ties_b", pa.float64()),
        ("kappa", pa.float64()),  # Cohen's; null if all verdicts of both are the same
        ("kappa_low", pa.float64()),
        ("kappa_high", pa.float64()),
        ("n", pa.int64()),  # pairs that both judged
    ]
)

_VERDICTS: tuple[Winner, ...] = ("a", "tie", "b")


def agreement(
    one: Sequence[Winner | None], other: Sequence[Winner | None], examples: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Return the agreement of two judges on the same pairs, in the same order; None if no pair has both verdicts.

    It is a row of the AGREEMENT schema without the names of the judges. Cohen's kappa is agreement beyond chance, at
    most 1, and 0 for independent judges. It is None if all verdicts of both are the same: then all agreement may be
    chance.

    Args:
        one: the first judge's verdicts, None for a pair that it did not judge.
        other: the second judge's.
        examples: number of each pair's example. Intervals resample examples, not pairs, because verdicts on outputs for
            one prompt are not independent.
        bootstrap: makes the intervals.
    """
    both = [
        (number, 3 * _VERDICTS.index(a) + _VERDICTS.index(b))
        for number, a, b in zip(examples, one, other, strict=True)
        if a is not None and b is not None
    ]
    if not both:
        return None
    numbers, cells = np.array(both).T
    _, places = np.unique(numbers, return_inverse=True)
    counts = np.zeros((9, places.max() + 1))  # pairs by both verdicts (first axis) and by example (second)
    np.add.at(counts, (cells, places), 1)
    same, pairs = counts[::4].sum(axis=0), counts.sum(axis=0)
    # If all examples agree, or none, the bootstrap interval has no width; Wilson's has.
    extreme = (same == pairs).all() or not same.any()
    raw = share(same > 0) if extreme or (pairs == 1).all() else bootstrap.ratio(same, pairs)
    alike = len(set(cells.tolist())) == 1 and cells[0] % 4 == 0
    kappa = None if alike else bootstrap.statistic(_kappa, *counts)
    if kappa is not None and kappa.low == kappa.high:  # all resamples are equal, which does not make it certain
        kappa = replace(kappa, low=None, high=None)
    table = counts.sum(axis=1).reshape(3, 3)
    tie = _VERDICTS.index("tie")
    clear = np.delete(np.delete(table, tie, axis=0), tie, axis=1)
    decided, same_decided = int(clear.sum()), int(np.trace(clear))
    return {
        "agreement": raw.value, "ci_low": raw.low, "ci_high": raw.high,
        "decided": same_decided / decided if decided else None, "n_decided": decided,
        "ties_a": float(table[tie].sum() / len(both)), "ties_b": float(table[:, tie].sum() / len(both)),
        "kappa": kappa and kappa.value, "kappa_low": kappa and kappa.low, "kappa_high": kappa and kappa.high,
        "n": len(both),
    }  # fmt: skip


def agreements(
    verdicts: Mapping[str, Sequence[Winner | None]], examples: Sequence[int], bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """Return a row (AGREEMENT schema) for every two judges with a pair in common.

    Args:
        verdicts: by judge's name, its verdicts on the same pairs, in the same order; None for no verdict.
        examples: number of each pair's example.
        bootstrap: makes the intervals.
    """
    rows = []
    for (a, of_a), (b, of_b) in itertools.combinations(verdicts.items(), 2):
        if found := agreement(of_a, of_b, examples, bootstrap):
            rows.append({"judge_a": a, "judge_b": b, **found})
    return rows


def _kappa(*counts: NDArray[np.float64], axis: int = -1) -> Any:
    """Return kappa (Cohen 1960, eq. 1) of the nine cells of the table of verdicts, counted by example along `axis`."""
    table = np.stack([np.sum(cell, axis=axis) for cell in counts]).reshape(
        3, 3, *np.shape(np.sum(counts[0], axis=axis))
    )
    table = table / table.sum(axis=(0, 1))
    observed = sum(table[verdict, verdict] for verdict in range(3))
    chance = (table.sum(axis=1) * table.sum(axis=0)).sum(axis=0)
    # A resample may have only one verdict, and then no disagreement.
    one_only = chance > 1 - 1e-12
    return np.where(one_only, 1.0, (observed - chance) / np.where(one_only, 1, 1 - chance))
