"""Rank by sentence embeddings, as Feng et al. 2025 (§3) do."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.embedder import PACKAGED, Embedded, Embedder, locate_embedder
from cpo_pipe.data.models.fetch import check_exists
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.scorers.scorer import Group, ScoreGroups, Scorer, ScorerDependencies, Scores


class EmbeddingScorer(Scorer):
    """Ranks by the cosine of a negative's sentence embedding to the target's."""

    model: Location = Field(
        "minilm", description="sentence-transformers model: `minilm` (packaged, offline), a folder or a hub name"
    )
    long_texts: Literal["truncate", "average"] = Field(
        "truncate",
        description="what to do with texts longer than the model's window: embed their beginning, or average the "
        "embeddings of chunks of that length",
    )

    def spec(self, dependencies: ScorerDependencies) -> Spec:
        """Return the fingerprint of the embedding model, and how long texts are embedded."""
        averaged = {"long_texts": "average"} if self.long_texts == "average" else {}
        return {"embedder": self.embedder(dependencies.store).fingerprint, **averaged}

    def open(self, dependencies: ScorerDependencies) -> ScoreGroups:
        """Return what computes cosines; the model is loaded at the first text."""
        embedder = self.embedder(dependencies.store)
        return partial(cosines, embedder.embed_averaged if self.long_texts == "average" else embedder.embed)

    def check_models(self) -> None:
        """Refuse an embedding model that does not exist."""
        if self.model != PACKAGED:
            check_exists(self.model, "embedding model")

    def embedder(self, store: Store) -> Embedder:
        """Return the embedding model, not loaded."""
        return locate_embedder(self.model, store)

    def window(self, store: Store) -> int | None:
        """Return how many tokens the model reads."""
        return self.embedder(store).window()


def cosines(embed: Callable[[Sequence[str]], Embedded], groups: Sequence[Group]) -> list[Scores]:
    """Return the cosine of each text of some groups to the target of its group, between −1 and 1."""
    vectors, truncated = embed([text for group in groups for text in group.texts])
    scores, start = [], 0
    for group in groups:
        part = slice(start, start + len(group.texts))
        similarity = [min(1.0, max(-1.0, float(cosine))) for cosine in vectors[part] @ vectors[start]]
        scores.append(Scores(similarity, truncated[part].tolist()))
        start = part.stop
    return scores
