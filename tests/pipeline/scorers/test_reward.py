"""The scorer `reward`."""

import logging
from pathlib import Path

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.reward_model import locate_reward_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.rank.rank import rank
from cpo_pipe.pipeline.scorers.reward import RewardScorer
from cpo_pipe.pipeline.scorers.scorer import ScorerDependencies
from tests.support.project import Project
from tests.support.reward_models import make_reward_model
from tests.support.scorers import plan


def test_negatives_rank_by_their_reward_given_the_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder, store = make_reward_model(tmp_path / "model", chat=True), Store(tmp_path / "store")
    texts = ["the fox", "a dog", "over the lazy dog", "x" * 200]
    wanted = plan(store, {"a": "the quick", "b": "brown"}, {"a": texts, "b": texts})
    groups = rank(RewardScorer(model=str(folder)), ScorerDependencies(store), wanted, LocalExecutor())
    model = locate_reward_model(str(folder), store, "rank.model")
    orders = []
    for row, target in zip(groups.read(["a", "b"]).to_pylist(), ("the quick", "brown"), strict=True):
        prompt = Conversation.of_text(f"prompt {row['example_id']}")
        expected = model.rate([prompt] * 5, [target, *texts]).rewards
        found = [candidate["similarity"] for candidate in row["candidates"]]
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
        ranked = sorted(row["candidates"], key=lambda candidate: candidate["rank"])
        assert ranked[0]["text"] == target
        rewards = [candidate["similarity"] for candidate in ranked[1:]]
        assert rewards == sorted(rewards, reverse=True)
        orders.append(found)
    assert orders[0] != orders[1], "the prompt counts"
    assert f"rank: 2 of 10 texts (20.0%) are longer than the 96 tokens that {folder} reads" in caplog.text


def test_a_model_that_gives_no_reward_is_refused_by_its_key(tmp_path: Path, tiny_model: Path) -> None:
    scorer = RewardScorer(model=str(tiny_model))
    with pytest.raises(InputError, match=r"^rank\.model .*: its architecture is LlamaForCausalLM"):
        scorer.spec(ScorerDependencies(Store(tmp_path)))


def test_a_run_ranks_by_a_reward_model_and_shows_its_scores(made: Project) -> None:
    folder = make_reward_model(made.root / "reward")
    options = ("--set", f"rank={{by: reward, model: {folder}}}")
    result = made.cli("rank", "tiny.yaml", *options)
    assert result.status == 0, result.err
    quality = made.cli("quality", "tiny.yaml", *options)
    assert quality.status == 0, quality.err
    assert "score in the ranking, mean" in quality.out
    missing = made.cli("rank", "tiny.yaml", "--set", "rank={by: reward}")
    assert missing.error().endswith("rank.model is missing")
