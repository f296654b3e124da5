"""What orders the negatives of a group, by name: `SCORERS` (`rank.by`); and what finds those that are correct."""

from cpo_pipe.data.registry import Registry
from cpo_pipe.pipeline.scorers.correct import CorrectAnswer, DropCorrect, RatedCorrect, SimilarToTarget
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer
from cpo_pipe.pipeline.scorers.exact import ExactScorer
from cpo_pipe.pipeline.scorers.judge import JudgeScorer
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.pipeline.scorers.reward import RewardScorer
from cpo_pipe.pipeline.scorers.scorer import Scorer

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    "by",
    Scorer,  # type: ignore[type-abstract]
    {
        "embedding": EmbeddingScorer,
        "exact": ExactScorer,
        "reward": RewardScorer,
        "judge": JudgeScorer,
        "none": NoScorer,
    },
    default="embedding",
)

FILTERS: Registry[DropCorrect] = Registry(
    "filter",
    "by",
    DropCorrect,  # type: ignore[type-abstract]
    {"exact": CorrectAnswer, "judge": RatedCorrect, "similarity": SimilarToTarget},
)
"""By `negatives.drop_correct.by`."""
