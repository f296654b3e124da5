"""The stage `rank`: groups of candidates, ordered by a scorer. `SCORERS` has the scorers by name (`rank.by`)."""

from cpo_pipe.data.registry import Registry
from cpo_pipe.pipeline.rank.embedding import EmbeddingScorer
from cpo_pipe.pipeline.rank.none import NoScorer
from cpo_pipe.pipeline.rank.scorer import Scorer

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    "by",
    Scorer,  # type: ignore[type-abstract]
    {"embedding": EmbeddingScorer, "none": NoScorer},
    default="embedding",
)
