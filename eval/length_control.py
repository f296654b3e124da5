"""Length-controlled win rate: what the win rate would be if the outputs compared had the same length.

After Dubois et al. 2024, "Length-Controlled AlpacaEval" (eq. 2), as AlpacaEval 2.0 computes it: the logistic model

    P(system preferred on x) = σ(θ + φ · tanh(Δ_x / sd(Δ))),

Δ_x the system's length less the baseline's in characters, is fitted to the outcomes of one system (a tie is half a win
and half a loss) and taken at Δ = 0. L1 penalty by liblinear on both, its strength by 5-fold cross-validation of the log
loss: both as there.

Two things of AlpacaEval belong to its own 805 instructions and baseline, and are left out. One is a term for the
instruction's difficulty, fitted to many systems' outcomes together with their lengths: the bare outcomes of the systems
at hand cannot stand for it, since those share the judge's liking for length, which it would then take for difficulty.
The other draws the fit, with a weight of 0.2, towards answers that the baseline was told to write shorter or longer.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.eval.statistics import Estimate

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

MIN_EXAMPLES = 100
MIN_RARER = 10
"""Wins and losses there must be of each, ties as halves: of fewer the penalty makes a rate nearer to one half."""

FOLDS = 5
REFITS = 100
"""Bootstrap refits for the standard error; percentiles would need thousands."""
WEAK = 10.0
"""Inverse of a penalty too weak to matter. A stronger one may make the rate one half in every refit, without error."""

Values = NDArray[np.float64]


def length_controlled(
    outcomes: Sequence[float] | Values, longer: Sequence[float] | Values, seed: int
) -> Estimate | None:
    """Win rate at equal length with its 95% interval (± 1.96 bootstrap standard errors); None for too few examples.

    Args:
        outcomes: of the system on each example, 1 (won) to 0 (lost).
        longer: characters of the system's output less the baseline's.
        seed: of the bootstrap.
    """
    scores, delta = np.asarray(outcomes, np.float64), np.asarray(longer, np.float64)
    n, wins = len(scores), scores.sum()
    if n < MIN_EXAMPLES or min(wins, n - wins) < MIN_RARER:
        return None
    lengths = np.tanh(delta / np.std(delta, ddof=1)) if np.ptp(delta) > 0 else np.zeros(n)
    design = np.stack([np.ones(n), lengths], axis=1)
    strength = _chosen_strength(design, scores)
    value = _rate(design, scores, strength)
    draws = np.random.default_rng(seed % (1 << 32)).integers(n, size=(REFITS, n))
    error = statistics.stdev(_rate(design[draw], scores[draw], max(strength, WEAK)) for draw in draws)
    return Estimate(value, max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error), n)


def _rate(design: Values, scores: Values, strength: float) -> float:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=0)
    _fit(model, design, scores)
    return float(np.mean(model.predict_proba(design * [1, 0])[:, 1]))


def _chosen_strength(design: Values, scores: Values) -> float:
    """Inverse of the penalty, of ten from 1e-4 to 1e4."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import GroupKFold

    n = len(scores)
    folds = GroupKFold(FOLDS).split(np.zeros(2 * n), groups=np.tile(np.arange(n), 2))  # both halves of an example
    model = LogisticRegressionCV(
        Cs=10, cv=list(folds), l1_ratios=(1,), solver="liblinear", scoring="neg_log_loss", fit_intercept=False,
        random_state=0, use_legacy_attributes=False,
    )  # fmt: skip
    _fit(model, design, scores)
    return float(model.C_)


def _fit(model: "LogisticRegression", design: Values, scores: Values) -> None:
    """Fit to outcomes between 0 and 1: an example is a win with its outcome's weight, and a loss with the rest."""
    n = len(scores)
    model.fit(np.tile(design, (2, 1)), np.repeat([1, 0], n), sample_weight=np.concatenate([scores, 1 - scores]))
