"""What a scorer is: the `rank` section of a recipe, and what orders the negatives of a group."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from cpo_pipe.data.config import Positive, Section
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.embedder import Embedder
from cpo_pipe.data.store import Store


@dataclass(frozen=True)
class Scores:
    """Scores of one group's K texts."""

    similarity: Sequence[float]
    """Similarity of each text to the target, shape (K,). A higher one ranks better. The target's own is ignored."""
    truncated: Sequence[bool] | None = None
    """Which texts the scorer did not read to their end, shape (K,); None: it reads any text."""


ScoreGroups = Callable[[Sequence[Sequence[str]]], Sequence[Scores]]
"""From the texts of some groups, each with the target first, to their scores, in the same order."""


class Scorer(Section):
    """How negatives are ranked, and which are dropped. The base class of all scorers."""

    ranks: ClassVar[bool] = True
    """Whether the scorer orders the negatives."""

    by: str = Field("embedding", description="scorer: `embedding`, `none` (no order), or your own as `module:Class`")
    drop_duplicates: bool = Field(
        True, description="drop negatives equal to the target or to each other, after tokenization"
    )
    batch_size: Positive = Field(64, description="groups scored at a time; does not change the order")

    @abstractmethod
    def spec(self, store: Store) -> Spec | None:
        """Return what decides the scores, as values that JSON can hold. A change invalidates groups."""

    @abstractmethod
    def open(self, store: Store) -> ScoreGroups:
        """Return the function that scores. It must be picklable, and load what is heavy when it is first called."""

    def embedder(self, store: Store) -> Embedder | None:
        """Return the embedding model that scores, if one does: evaluation marks the metrics that use the same."""
        return None
