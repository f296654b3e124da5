"""How many planted correct negatives are found, and how many wrong ones are taken for correct; docs/log.md has more."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.scorers import FILTERS
from cpo_pipe.pipeline.scorers.scorer import ScorerDependencies
from tests.support.planted import plant
from tests.support.scorers import group

PRICES = [(3, 6), (12, 45), (20, 125), (7, 8), (150, 300), (2, 11)]
ANSWERS = [
    f"Each crate has {n} melons.\nShe sells the melons for {n} * {price} = $<<{n}*{price}={n * price}>>{n * price} in "
    f"total.\n#### {n * price:,}"
    for n, price in PRICES
]


def found(root: Path, by: dict[str, Any]) -> tuple[float, float, Counter[str]]:
    """Return recall, the share of wrong negatives that are taken for correct, and both by kind."""
    planted = [plant(answer, ANSWERS[place - 1]) for place, answer in enumerate(ANSWERS)]
    drop = FILTERS.parse(by)
    score = drop.scorer().open(ScorerDependencies(Store(root)))
    groups = [group(answer, *(one.text for one in ones)) for answer, ones in zip(ANSWERS, planted, strict=True)]
    taken = Counter[str]()
    shares = {True: 0.0, False: 0.0}
    for ones, scores in zip(planted, score(groups), strict=True):
        for one, value in zip(ones, scores.similarity[1:], strict=True):
            if value >= drop.least:
                taken[one.kind] += 1
                shares[one.correct] += 1 / (4 * len(ANSWERS))
    return shares[True], shares[False], taken


@pytest.mark.parametrize(
    ("pattern", "recall"),
    [("gsm8k", 0.75), (r"(?:####|answer is)\s*((?:[-+−]?\p{Sc} ?)?[-+−]?[\d,.]*\d)", 1), (None, 0)],
)
def test_exact_finds_what_its_pattern_finds_and_takes_no_wrong_one(
    tmp_path: Path, pattern: str | None, recall: float
) -> None:
    right, wrong, _ = found(tmp_path, {"by": "exact", "pattern": pattern})
    assert (right, wrong) == (pytest.approx(recall), 0)


def test_similarity_finds_paraphrases_and_sees_no_numbers(tmp_path: Path) -> None:
    _, wrong, taken = found(tmp_path, {"by": "similarity", "threshold": 0.8})
    assert taken["reworded"] == len(ANSWERS)
    assert taken["answer only"] == 0
    assert taken["slip at the end"] == len(ANSWERS), "another number is as similar"
    assert wrong > 0.25
