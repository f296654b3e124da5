"""What a scorer is: the `rank` section of a recipe, and what orders the negatives of a group."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from cpo_pipe.data.config import Positive, Section
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.embedder import Embedder
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.api.model import ApiModel


@dataclass(frozen=True)
class Group:
    """A prompt with the texts to score."""

    example_id: str
    prompt: str
    """As in the source; of a conversation all messages, with their roles."""
    conversation: Conversation
    """The messages before the answer; a prompt that is a text is one user message."""
    texts: Sequence[str]
    """The K candidates, the target first."""

    @property
    def target(self) -> str:
        """The ground truth."""
        return self.texts[0]


@dataclass(frozen=True)
class Scores:
    """Scores of one group's K texts."""

    similarity: Sequence[float]
    """Score of each text, shape (K,). A higher one ranks better. The target ranks first whatever its own is."""
    truncated: Sequence[bool] | None = None
    """Which texts the scorer did not read to their end, shape (K,); None: it reads any text."""


ScoreGroups = Callable[[Sequence[Group]], Sequence[Scores]]
"""From some groups to the scores of their texts, in the same order."""


@dataclass(frozen=True)
class ScorerDependencies:
    """What scorers may need."""

    store: Store
    apis: Mapping[str, ApiModel] = field(default_factory=dict)
    """The recipe's `apis`, by name."""


class Scorer(Section):
    """How negatives are ranked, and which are dropped. The base class of all scorers."""

    ranks: ClassVar[bool] = True
    """Whether the scorer orders the negatives."""
    in_process: ClassVar[bool] = False
    """Whether it scores in this process, whatever the executor is: requests to an API."""

    by: str = Field(
        "embedding",
        description="scorer: `embedding`, `exact`, `reward`, `judge`, `none` (no order), or your own as `module:Class`",
    )
    drop_duplicates: bool = Field(
        True, description="drop negatives equal to the target or to each other, after tokenization"
    )
    batch_size: Positive = Field(64, description="groups scored at a time; does not change the order")

    @abstractmethod
    def spec(self, dependencies: ScorerDependencies) -> Spec | None:
        """Return what decides the scores, as values that JSON can hold. A change invalidates groups."""

    @abstractmethod
    def open(self, dependencies: ScorerDependencies) -> ScoreGroups:
        """Return the function that scores. It must be picklable, and load what is heavy when it is first called."""

    def check(self, dependencies: ScorerDependencies, targets: Sequence[str]) -> None:  # most need none
        """Raise InputError if the scorer cannot work with these targets; called before anything is made."""

    def check_models(self) -> None:  # most need none
        """Raise InputError if a model that it names does not exist; download nothing."""

    def notes(self, dependencies: ScorerDependencies, examples: pa.Table) -> list[str]:
        """Return what a user should know about the scores of these examples, one sentence each."""
        return []

    def apis(self) -> list[str]:
        """Return the names of the APIs it asks."""
        return []

    def embedder(self, store: Store) -> Embedder | None:
        """Return the embedding model that scores, if one does: evaluation marks the metrics that use the same."""
        return None

    def window(self, store: Store) -> int | None:
        """Return how many tokens of a text it reads, if that is known. Longer texts are marked as truncated."""
        return None
