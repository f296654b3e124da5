"""Length-controlled win rate: what the win rate would be if the outputs compared had the same length.

After Dubois et al. 2024, "Length-Controlled AlpacaEval" (eq. 2), as AlpacaEval 2.0 computes it: the logistic model

    P(system preferred on x) = σ(θ + ψ · γ_x + φ · tanh(Δ_x / sd(Δ))),

Δ_x the system's length less the baseline's in characters and γ_x the instruction's difficulty, is fitted to the
outcomes of one system (a tie is half a win and half a loss) and averaged over the examples at Δ = 0. L1 penalty by
liblinear on all three, its strength by 5-fold cross-validation of the log loss: both as there.

Two things of AlpacaEval belong to its own 805 instructions and baseline. Its γ_x were fitted to many systems' outcomes
on them: ours are made of the other systems' outcomes on the same example (`difficulty`), and the term is left out where
there are none. Its fit is also drawn, with a weight of 0.2, towards answers that the baseline was told to write
shorter or longer: nobody has those for other data, so they are left out.

Legend: S systems, N examples.
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
    outcomes: Sequence[float] | Values, longer: Sequence[float] | Values, difficulty_N: Values | None, seed: int
) -> Estimate | None:
    """Win rate at equal length with its 95% interval (± 1.96 bootstrap standard errors); None for too few examples.

    Args:
        outcomes: of the system on each example, 1 (won) to 0 (lost).
        longer: characters of the system's output less the baseline's.
        difficulty_N: of each example, from the other systems; None where there are none.
        seed: of the bootstrap.
    """
    scores, delta = np.asarray(outcomes, np.float64), np.asarray(longer, np.float64)
    n, wins = len(scores), scores.sum()
    if n < MIN_EXAMPLES or min(wins, n - wins) < MIN_RARER:
        return None
    lengths = np.tanh(delta / np.std(delta, ddof=1)) if np.ptp(delta) > 0 else np.zeros(n)
    hardness = np.zeros(n) if difficulty_N is None else difficulty_N
    design = np.stack([np.ones(n), hardness, lengths], axis=1)
    strength = _chosen_strength(design, scores)
    value = _rate(design, scores, strength)
    draws = np.random.default_rng(seed % (1 << 32)).integers(n, size=(REFITS, n))
    error = statistics.stdev(_rate(design[draw], scores[draw], max(strength, WEAK)) for draw in draws)
    return Estimate(value, max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error), n)


def difficulty(outcomes_SN: Values) -> Values:
    """How easily each example is won, by the outcomes of other systems: their log odds, centred, (N,).

    Half a win and half a loss are added, so that it stays finite.
    """
    wins = outcomes_SN.sum(axis=0)
    odds = np.log((wins + 0.5) / (len(outcomes_SN) - wins + 0.5))
    centred: Values = odds - odds.mean()
    return centred


def _rate(design: Values, scores: Values, strength: float) -> float:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=0)
    _fit(model, design, scores)
    return float(np.mean(model.predict_proba(design * [1, 1, 0])[:, 1]))


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
