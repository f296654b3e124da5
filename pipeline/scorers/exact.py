"""Rank by whether the answer is right, found by a regular expression."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from cpo_pipe.data.final_answer import AnswerFinder, Pattern
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.pipeline.scorers.scorer import Group, ScoreGroups, Scorer, ScorerDependencies, Scores


class ExactScorer(Scorer):
    """Ranks negatives with the target's answer (score 1) before those with another one (score 0)."""

    by: str = Field("exact", description=Scorer.model_fields["by"].description)
    pattern: Pattern = None

    section: ClassVar[str] = "rank"
    """The section of the recipe that has the pattern, for messages."""
    unanswered: ClassVar[str] = "their negatives count as wrong"
    """What follows for a target without an answer."""

    def spec(self, dependencies: ScorerDependencies) -> Spec:
        """Return the pattern and the version of the comparison."""
        return {"scorer": "exact", **self._finder().spec()}

    def open(self, dependencies: ScorerDependencies) -> ScoreGroups:
        """Return what compares answers."""
        return partial(exact_scores, self._finder())

    def check(self, dependencies: ScorerDependencies, targets: Sequence[str]) -> None:
        """Refuse a pattern that matches no target."""
        self._finder().check(targets)

    def notes(self, dependencies: ScorerDependencies, examples: pa.Table) -> list[str]:
        """Return how many targets the pattern does not match, or matches only in part."""
        return self._finder().notes(examples["target"].to_pylist(), self.unanswered)

    def _finder(self) -> AnswerFinder:
        return AnswerFinder(self.pattern, f"{self.section}.pattern")


def exact_scores(finder: AnswerFinder, groups: Sequence[Group]) -> list[Scores]:
    """Return 1 for each text with the target's answer and 0 for the others; all 0 where the target has no answer."""
    return [Scores([float(finder.agree(text, group.target)) for text in group.texts]) for group in groups]
