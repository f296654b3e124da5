"""Distinct n-grams of all outputs together, and by how much one system is nearer to the ground truth than another."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.eval.metrics.differences import compared
from cpo_pipe.eval.statistics.bootstrap import CONFIDENCE, Estimate, Values
from cpo_pipe.eval.statistics.tests import holm

PERMUTATIONS = 999
"""Random exchanges of two systems' outputs; the smallest p is 0.001."""

Texts = Sequence[Sequence[int]]


def n_grams(token_ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return the n-grams of a text, repeated ones included."""
    return [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]


def distinct_n(texts: Texts, n: int = 2) -> float:
    """Return distinct n-grams divided by all n-grams of all texts together (Li et al. 2016); 0 without n-grams.

    Low values mean that the texts are alike. The value falls with the number of texts, so that only systems measured on
    the same prompts can be compared.
    """
    grams = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_estimate(texts: Texts, n: int) -> Estimate:
    """Return `distinct_n` with its jackknife interval over texts.

    A bootstrap would be wrong here: a text that is drawn twice has no distinct n-gram of its own.
    """
    value, without = distinct_n(texts, n), _leave_one_out(texts, n)
    low, high = _jackknife(value, without)
    return Estimate(value, low, high, len(texts))


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
    target, targets_without = distinct_n(truth, n), _leave_one_out(truth, n)
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(compared(outputs, baseline, fingerprints), 2):
        gain = _nearer(distinct_n(outputs[a], n), distinct_n(outputs[b], n), target)
        without = _nearer(_leave_one_out(outputs[a], n), _leave_one_out(outputs[b], n), targets_without)
        low, high = _jackknife(float(gain), without)
        rows.append({
            "metric": metric, "decoding": decoding, "system_a": a, "system_b": b, "difference": float(gain),
            "ci_low": low, "ci_high": high, "p": _permutation_p(outputs[a], outputs[b], n, target, seed),
            "n": len(truth), "n_needed": None,
        })  # fmt: skip
    adjusted = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def _nearer(a: Any, b: Any, truth: Any) -> Any:
    return np.abs(b - truth) - np.abs(a - truth)


def _leave_one_out(texts: Texts, n: int) -> Values:
    """Return `distinct_n` of all texts but one, for each of them."""
    grams = [Counter(n_grams(text, n)) for text in texts]
    holders = Counter(gram for counted in grams for gram in counted)
    own = np.array([sum(holders[gram] == 1 for gram in counted) for counted in grams], np.float64)
    totals = np.array([counted.total() for counted in grams], np.float64)
    rest = totals.sum() - totals
    left: Values = np.divide(len(holders) - own, rest, out=np.zeros_like(rest), where=rest > 0)
    return left


def _jackknife(value: float, without: Values) -> tuple[float | None, float | None]:
    """Return the 95% interval of a statistic from its values without each example; None for a single example."""
    from scipy.stats import norm

    count = len(without)
    if count < 2:
        return None, None
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    half = float(norm.ppf((1 + CONFIDENCE) / 2) * error)
    return value - half, value + half


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
