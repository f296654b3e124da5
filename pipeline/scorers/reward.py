"""Rank by a reward model."""

from collections.abc import Sequence
from functools import partial

from pydantic import Field

from cpo_pipe.data.config import Location
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.fetch import check_exists
from cpo_pipe.data.models.reward_model import RewardModel, locate_reward_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.scorers.scorer import Group, ScoreGroups, Scorer, ScorerDependencies, Scores


class RewardScorer(Scorer):
    """Ranks by a reward model's output for prompt and negative; the target's text is not used."""

    by: str = Field("reward", description=Scorer.model_fields["by"].description)
    model: Location = Field(
        description="reward model: a folder or a hub name of a sequence classifier with one output, in safetensors"
    )

    def spec(self, dependencies: ScorerDependencies) -> Spec:
        """Return the fingerprints of model and tokenizer, and the date that a chat template prints."""
        return {"scorer": "reward", **self._located(dependencies.store).spec()}

    def open(self, dependencies: ScorerDependencies) -> ScoreGroups:
        """Return what computes rewards; the model is loaded at the first text."""
        return partial(reward_scores, self._located(dependencies.store))

    def check_models(self) -> None:
        """Refuse a reward model that does not exist."""
        check_exists(self.model, "reward model")

    def window(self, store: Store) -> int | None:
        """Return how many tokens of prompt and answer the model reads."""
        return self._located(store).window()

    def _located(self, store: Store) -> RewardModel:
        return locate_reward_model(self.model, store, "rank.model")


def reward_scores(model: RewardModel, groups: Sequence[Group]) -> list[Scores]:
    """Return the rewards of the texts of some groups, those of targets too."""
    conversations = [group.conversation for group in groups for _ in group.texts]
    rewards, truncated = model.rate(conversations, [text for group in groups for text in group.texts])
    scores, start = [], 0
    for group in groups:
        part = slice(start, start + len(group.texts))
        scores.append(Scores(rewards[part].tolist(), truncated[part].tolist()))
        start = part.stop
    return scores
