"""Rank by the ratings of a language model."""

from collections.abc import Sequence
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.pipeline.scorers.ratings import Rater, RatingSettings
from cpo_pipe.pipeline.scorers.scorer import Scorer, ScorerDependencies


class JudgeScorer(RatingSettings, Scorer):
    """Ranks by how right a model behind an API finds a negative, given prompt and target."""

    in_process: ClassVar[bool] = True

    by: str = Field("judge", description=Scorer.model_fields["by"].description)

    def spec(self, dependencies: ScorerDependencies) -> Spec:
        """Return what decides a rating."""
        return {"scorer": "judge", **self.open(dependencies).spec()}

    def open(self, dependencies: ScorerDependencies) -> Rater:
        """Return what asks for ratings."""
        api = dependencies.apis[self.api]
        return Rater(api, self.template, self.max_tokens, self.temperature, dependencies.store)

    def check(self, dependencies: ScorerDependencies, targets: Sequence[str]) -> None:
        """Refuse an API whose client or key is missing."""
        dependencies.apis[self.api].check_client()

    def notes(self, dependencies: ScorerDependencies, examples: pa.Table) -> list[str]:
        """Return how many negatives have no rating."""
        return self.open(dependencies).notes(examples["example_id"].to_pylist())

    def apis(self) -> list[str]:
        """Return the API."""
        return [self.api]
