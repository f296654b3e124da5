"""Length-controlled win rate: the win rate expected if both systems wrote outputs of the same length.

After Dubois et al. 2024, "Length-Controlled AlpacaEval" (eq. 2). The logistic model

    P(system preferred on x) = σ(θ + φ · tanh(Δ_x / sd(Δ)))

is fitted to one system's outcomes (a tie is half a win and half a loss); Δ_x is the length of the system's output
minus the baseline's, in characters. The rate is σ(θ), the prediction at Δ = 0.

Four points differ from AlpacaEval 2.0:

- θ is not penalized. AlpacaEval penalizes both coefficients, which pulls every rate towards one half.
- φ has a fixed, weak L2 penalty, which matters only if length alone separates wins from losses. AlpacaEval selects
  an L1 penalty by cross-validation. A selected penalty often sets φ to zero if the judge prefers length slightly:
  the rate is then the raw one, with an interval too narrow (docs/log.md, 2026-11-29).
- There is no term for an instruction's difficulty. AlpacaEval estimates it from many systems' outcomes; the
  systems of one evaluation share the judge's preference for length, which such a term would absorb.
- The fit is not regularized by the outcomes of a baseline that was prompted for shorter or longer answers.
"""

import statistics
from collections.abc import Sequence

import numpy as np

from cpo_pipe.eval.statistics.bootstrap import Bootstrap, Estimate, Values

MIN_EXAMPLES = 100
MIN_RARER = 10
"""Minimum number of wins, and of losses, with ties as halves."""

MIN_SIDE = 0.15
"""Share of the examples on which the system that usually writes more writes less, or the other way round. Below it,
Δ = 0 is an extrapolation: on AlpacaEval's annotations of 56 models, rates differed from the published ones by 0.7
points on average and 2.0 at most above it, and by 7.5 and 27 below (docs/log.md, 2026-11-30)."""

REFITS = 100
"""Bootstrap refits for the standard error; percentiles would need thousands."""
PENALTY = 0.01
"""Weight of φ² / 2 beside the summed log loss."""


def length_controlled(
    outcomes: Sequence[float] | Values, longer: Sequence[float] | Values, bootstrap: Bootstrap
) -> Estimate | None:
    """Return the win rate at equal length with its 95% interval, or None where the examples do not determine it.

    Where all lengths or all outcomes are equal, this is the raw win rate with its interval. Otherwise the interval is
    θ ± 1.96 bootstrap standard errors, as win rates. Swapping the systems gives one minus the rate and its interval.

    Args:
        outcomes: the system's outcome on each example, from 1 (won) to 0 (lost).
        longer: characters of the system's output minus the baseline's.
        bootstrap: gives the seed, and the interval of a raw win rate.
    """
    scores, delta = np.asarray(outcomes, np.float64), np.asarray(longer, np.float64)
    n, wins = len(scores), scores.sum()
    if n < MIN_EXAMPLES or min(wins, n - wins) < MIN_RARER:
        return None
    if min((delta <= 0).mean(), (delta >= 0).mean()) < MIN_SIDE:
        return None
    if np.ptp(delta) == 0 or np.ptp(scores) == 0:
        return bootstrap.rate(scores)
    lengths = np.tanh(delta / np.std(delta, ddof=1))
    theta = _theta(scores, lengths)
    draws = np.random.default_rng(bootstrap.seed % (1 << 32)).integers(n, size=(REFITS, n))
    error = statistics.stdev(_theta(scores[draw], lengths[draw]) for draw in draws)
    value, low, high = (1 / (1 + np.exp(-(theta + 1.96 * side * error))) for side in (0, -1, 1))
    return Estimate(float(value), float(low), float(high), n)


def _theta(scores: Values, lengths: Values) -> float:
    from sklearn.linear_model import LogisticRegression

    # An outcome between 0 and 1 is a win of that weight and a loss of the rest. scikit-learn leaves the intercept, θ,
    # unpenalized.
    features, labels = np.tile(lengths, 2)[:, None], np.repeat([1, 0], len(scores))
    model = LogisticRegression(C=1 / PENALTY, solver="newton-cholesky", tol=1e-8)
    model.fit(features, labels, sample_weight=np.concatenate([scores, 1 - scores]))
    return float(model.intercept_[0])
