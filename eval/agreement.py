"""How far two judges, or a judge and people, give the same verdicts on the same pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpo_pipe.eval.statistics import Bootstrap, Estimate, share

VERDICTS = ("a", "tie", "b")


@dataclass(frozen=True)
class Agreement:
    """How often two judges agree."""

    raw: Estimate
    """Share of pairs with the same verdict."""
    kappa: Estimate | None
    """Cohen's kappa: agreement beyond chance, 1 at most, 0 for judges that know nothing of each other's reasons.

    None where both gave one and the same verdict everywhere, when all agreement may be chance.
    """


def agreement(one: Sequence[str], other: Sequence[str], bootstrap: Bootstrap) -> Agreement:
    """Agreement of two judges' verdicts (`a`, `tie`, `b`) on the same pairs, in the same order."""
    codes = [np.array([VERDICTS.index(verdict) for verdict in verdicts], np.float64) for verdicts in (one, other)]
    raw = share(codes[0] == codes[1])
    return Agreement(raw, None if len({*one, *other}) == 1 else bootstrap.statistic(_kappa, *codes))


def _kappa(one: Any, other: Any, axis: int = -1) -> Any:
    """Cohen 1960, eq. 1, of verdicts along `axis`."""
    observed = np.mean(one == other, axis=axis)
    shares = [[np.mean(codes == code, axis=axis) for code in range(len(VERDICTS))] for codes in (one, other)]
    chance = sum(p * q for p, q in zip(*shares, strict=True))
    # A resample may have one verdict only, and then no disagreement either.
    return np.where(chance < 1, (observed - chance) / np.where(chance < 1, 1 - chance, 1), 1.0)
