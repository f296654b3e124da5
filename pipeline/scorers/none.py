"""No ranking, for objectives that see no order among negatives."""

from typing import ClassVar

from pydantic import Field

from cpo_pipe.pipeline.scorers.scorer import ScoreGroups, Scorer, ScorerDependencies


class NoScorer(Scorer):
    """Leaves negatives in no order; needs no model."""

    ranks: ClassVar[bool] = False

    by: str = Field("none", description=Scorer.model_fields["by"].description)

    def spec(self, dependencies: ScorerDependencies) -> None:
        """Return None: no score decides the groups."""

    def open(self, dependencies: ScorerDependencies) -> ScoreGroups:
        """Raise; groups without a rank are not scored."""
        raise AssertionError("unranked groups are not scored")
