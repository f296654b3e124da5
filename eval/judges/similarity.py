"""The judge `similarity`: which output is nearer to the target, by sentence embeddings."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.eval.judges.base import NOISE, Case, JudgeConfig, JudgeDependencies, ScoreJudge, ScoreMetric

RULES = 2
"""Version of the comparison. Raise it when the same texts get another verdict."""

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Return unit vectors of texts, (n, d)."""


class Similarity(JudgeConfig):
    """Prefer the output whose embedding is nearer to the target's."""

    uses_embeddings: ClassVar[bool] = True
    compares_to_target: ClassVar[bool] = True

    def score_metric(self, name: str) -> ScoreMetric:
        """Return the mean cosine. It has one name: an evaluation has one embedding model."""
        return ScoreMetric("cosine to target", "mean cosine of an output's embedding to its target's, −1 to 1; higher "
                           "is better")  # fmt: skip

    def open(self, name: str, dependencies: JudgeDependencies) -> "SimilarityJudge":
        """Return the judge."""
        assert dependencies.embedder is not None
        assert dependencies.embeddings is not None
        encode, fingerprint = dependencies.embeddings.encode, dependencies.embedder.fingerprint
        return SimilarityJudge(name, self.score_metric(name), encode, fingerprint)


class SimilarityJudge(ScoreJudge):
    """Score the cosine between the embeddings of output and target, −1 to 1."""

    noise = NOISE

    def __init__(self, name: str, metric: ScoreMetric, encode: Encode, fingerprint: str):
        super().__init__(name, metric)
        self._encode = encode
        self._fingerprint = fingerprint

    def spec(self) -> Spec:
        """Return everything that decides a verdict."""
        return {"judge": "similarity", "embedder": self._fingerprint, "rules": RULES}

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Return the cosine of each output to its target."""
        cosines = np.einsum("nd,nd->n", self._encode(outputs), self._encode([case.target for case in cases]))
        return [min(1.0, max(-1.0, float(cosine))) for cosine in cosines]
