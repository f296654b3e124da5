"""Rank by sentence embeddings, as Feng et al. 2025 (§3) do."""

from collections.abc import Sequence
from functools import partial

from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.embedder import Embedder, locate_embedder
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.rank.scorer import ScoreGroups, Scorer, Scores


class EmbeddingScorer(Scorer):
    """Ranks by the cosine of a negative's sentence embedding to the target's."""

    model: Location = Field(
        "minilm", description="sentence-transformers model: `minilm` (packaged, offline), a folder or a hub name"
    )

    def spec(self, store: Store) -> Spec:
        """Return the fingerprint of the embedding model."""
        return {"embedder": self.embedder(store).fingerprint}

    def open(self, store: Store) -> ScoreGroups:
        """Return what computes cosines; the model is loaded at the first text."""
        return partial(cosines, self.embedder(store))

    def embedder(self, store: Store) -> Embedder:
        """Return the embedding model, not loaded."""
        return locate_embedder(self.model, store)


def cosines(embedder: Embedder, groups: Sequence[Sequence[str]]) -> list[Scores]:
    """Return the cosine of each text of some groups to the first of its group, between −1 and 1."""
    vectors, truncated = embedder.embed([text for texts in groups for text in texts])
    scores, start = [], 0
    for texts in groups:
        group = slice(start, start + len(texts))
        similarity = [min(1.0, max(-1.0, float(cosine))) for cosine in vectors[group] @ vectors[start]]
        scores.append(Scores(similarity, truncated[group].tolist()))
        start += len(texts)
    return scores
