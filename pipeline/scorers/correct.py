"""Negatives that are correct answers, which `negatives.drop_correct` removes from the groups.

A scorer and the lowest score of a correct answer decide.
"""

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from cpo_pipe.data.config import Location, Section, Share
from cpo_pipe.data.final_answer import Pattern
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer
from cpo_pipe.pipeline.scorers.exact import ExactScorer
from cpo_pipe.pipeline.scorers.judge import JudgeScorer
from cpo_pipe.pipeline.scorers.ratings import RatingSettings
from cpo_pipe.pipeline.scorers.scorer import Scorer, ScorerDependencies

CORRECT = "correct by "
"""Prefix of the reasons for dropping correct negatives."""


class DropCorrect(Section):
    """Which negatives are correct. The base class of all filters."""

    by: str = Field(
        description="what finds correct negatives: `exact`, `judge`, `similarity`, or your own as `module:Class`"
    )

    @abstractmethod
    def scorer(self) -> Scorer:
        """Return what scores the negatives."""

    @property
    @abstractmethod
    def least(self) -> float:
        """The lowest score of a correct negative."""

    @property
    def reason(self) -> str:
        """Why a negative is dropped, for the dropped rows."""
        return f"{CORRECT}{self.by}"

    def spec(self, dependencies: ScorerDependencies) -> Spec:
        """Return what decides which negatives are dropped, and their reason."""
        return {"by": self.by, "scorer": self.scorer().spec(dependencies), "least": self.least}


class _Answers(ExactScorer):
    """Compares answers, with messages about the filter."""

    section: ClassVar[str] = "negatives.drop_correct"
    unanswered: ClassVar[str] = "their negatives are kept"


class CorrectAnswer(DropCorrect):
    """Drops negatives with the target's answer, found by a regular expression."""

    pattern: Pattern = None

    def scorer(self) -> Scorer:
        """Return what compares answers."""
        return _Answers(pattern=self.pattern)

    @property
    def least(self) -> float:
        """1: the answer is the target's."""
        return 1.0


class RatedCorrect(RatingSettings, DropCorrect):
    """Drops negatives that a model behind an API rates as right."""

    threshold: Share = Field(
        0.9, description="lowest rating of a correct negative, from 0 to 1: the grade divided by 10"
    )

    def scorer(self) -> Scorer:
        """Return what asks for ratings."""
        return JudgeScorer(
            api=self.api, template=self.template, max_tokens=self.max_tokens, temperature=self.temperature
        )

    @property
    def least(self) -> float:
        """The threshold."""
        return self.threshold


class SimilarToTarget(DropCorrect):
    """Drops negatives that are as similar to the target as a paraphrase, by sentence embeddings."""

    model: Location = Field("minilm", description=EmbeddingScorer.model_fields["model"].description)
    threshold: Share = Field(description="lowest cosine to the target of a correct negative")

    def scorer(self) -> Scorer:
        """Return what computes cosines, of whole texts: a text that differs at its end is not a paraphrase."""
        return EmbeddingScorer(model=self.model, long_texts="average")

    @property
    def least(self) -> float:
        """The threshold."""
        return self.threshold
