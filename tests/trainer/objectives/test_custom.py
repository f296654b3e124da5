"""A user's own objective: the one of the guide, from the recipe to the model card, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_pipe.trainer.objectives import OBJECTIVES
from tests.support.training import CANDIDATES, Bench, metrics, naive_logprob, weights

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "custom-objective.md"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is imported from, with the guide's example."""
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    (tmp_path / "ipo.py").write_text(found[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_example_of_the_guide_trains_and_has_a_model_card(modules: Path, tiny_model: Path) -> None:
    bench = Bench(modules, tiny_model)
    other = bench.train("mle", learning_rate=1e-2)
    artifact = bench.train("ipo:IPO", tau=0.25, max_steps=2, learning_rate=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, tensor in weights(artifact).items():
        assert tensor.shape == dict(model.state_dict())[name].shape
    # The policy starts as its reference: all margins are 0.
    first, second = metrics(artifact)
    assert first["loss"] == pytest.approx((1 / 0.5) ** 2, rel=1e-3)
    assert second["loss"] < first["loss"]
    assert artifact.path != other.path
    card = (artifact.path / "README.md").read_text(encoding="utf-8")
    assert "`ipo:IPO`" in card
    assert "IPO: squared distance of each log-ratio margin to its goal. Azar et al. 2023" in " ".join(card.split())
    assert "tau: 0.25" in card
    # The second step's loss, from the weights after the first one.
    one = AutoModelForCausalLM.from_pretrained(bench.train("ipo:IPO", tau=0.25, max_steps=1, learning_rate=1e-5).path)
    frozen = AutoModelForCausalLM.from_pretrained(tiny_model)
    losses = []
    with torch.no_grad():
        for prompt, candidates, _ in CANDIDATES.values():
            ratio = [float(naive_logprob(one, prompt, ids) - naive_logprob(frozen, prompt, ids)) for ids in candidates]
            losses.append(sum((ratio[0] - other - 2) ** 2 for other in ratio[1:]) / (len(ratio) - 1))
    assert second["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


INCOMPLETE = '''
from cpo_pipe.trainer.objectives.preference import ReferenceTraining
class Silent(ReferenceTraining):
    """A loss of its own."""
class Mute(ReferenceTraining):
    def preference_loss(self, policy_GK, reference_GK, batch): ...
class Stranger: ...
'''


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Silent", "objective bad:Silent is incomplete; implement preference_loss"),
        ("Mute", "objective bad:Mute has no docstring; describe it in one line"),
        ("Stranger", "must be a subclass of cpo_pipe.trainer.objectives.base.Training"),
        ("Absent", "objective bad:Absent cannot be imported"),
    ],
)
def test_a_wrong_class_is_refused_when_the_recipe_is_read(modules: Path, name: str, message: str) -> None:
    (modules / "bad.py").write_text(INCOMPLETE, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        OBJECTIVES.parse({"objective": f"bad:{name}", "init": "m", "reference": "m"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_complete(name: str) -> None:
    assert OBJECTIVES[name].citation or name == "mle"
    assert OBJECTIVES.description(name).endswith(".")
