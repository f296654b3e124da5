"""The scorer `exact`."""

import logging
from pathlib import Path

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.rank.rank import rank
from cpo_pipe.pipeline.scorers.exact import ExactScorer
from cpo_pipe.pipeline.scorers.scorer import ScorerDependencies
from tests.support.scorers import group, plan


def test_correct_negatives_score_1_and_wrong_ones_0(tmp_path: Path) -> None:
    score = ExactScorer(pattern="gsm8k").open(ScorerDependencies(Store(tmp_path)))
    found = score(
        [
            group("2 + 2 = 4\n#### 4", "#### 5", "so 4\n#### $4.00", "no answer", "#### 44"),
            group("no answer", "no answer", "#### 4"),
        ]
    )
    assert [scores.similarity for scores in found] == [[1, 0, 1, 0, 0], [0, 0, 0]]


def test_correct_negatives_rank_first_and_ties_go_by_candidate_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = Store(tmp_path)
    wanted = plan(
        store,
        {"x": "#### 4", "y": "#### 7", "z": "none"},
        {"x": ["#### 5", "it is #### 4", "#### 6"], "y": ["#### 1", "#### 2", "#### 3"], "z": ["a", "b", "c"]},
    )
    groups = rank(ExactScorer(pattern="gsm8k"), ScorerDependencies(store), wanted, LocalExecutor())
    for row in groups.read(["x", "y", "z"]).to_pylist():
        target, *negatives = sorted(row["candidates"], key=lambda candidate: candidate["rank"])
        assert target["strategy"] == "target"
        order = [(-candidate["similarity"], candidate["candidate_id"]) for candidate in negatives]
        assert order == sorted(order)
        if row["example_id"] == "x":
            assert negatives[0]["text"] == "it is #### 4"
    assert "8 negatives have the same score as another one of their group" in caplog.text
    assert "the pattern matches nothing in 1 of 3 targets; their negatives count as wrong" in caplog.text


def test_a_pattern_that_matches_no_target_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    wanted = plan(store, {"x": "4"}, {"x": ["5"]})
    with pytest.raises(InputError, match=r"^rank\.pattern is 'gsm8k': it matches none of the 1 targets"):
        rank(ExactScorer(pattern="gsm8k"), ScorerDependencies(store), wanted, LocalExecutor())


def test_another_pattern_makes_other_groups(tmp_path: Path) -> None:
    dependencies = ScorerDependencies(Store(tmp_path))
    specs = [ExactScorer(pattern=pattern).spec(dependencies) for pattern in (None, "gsm8k", "a(b)")]
    assert len({str(spec) for spec in specs}) == 3
