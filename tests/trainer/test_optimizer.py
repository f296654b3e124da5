"""What AdamW is given: the same as transformers' Trainer gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.optimizer import lr_factor, parameter_groups
from tests.support import architectures
from tests.support.training import Bench, weights


def config(**settings: Any) -> Training:
    return OBJECTIVES.parse({"init": "m", "objective": "mle", **settings})


@pytest.mark.parametrize("lr_scheduler_type", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 30])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 6, 7, 30, 40])
def test_learning_rates_are_those_of_transformers(lr_scheduler_type: str, max_steps: int, warmup_steps: int) -> None:
    from transformers import get_scheduler

    settings = config(lr_scheduler_type=lr_scheduler_type, max_steps=max_steps, warmup_steps=warmup_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if lr_scheduler_type == "constant" else lr_scheduler_type
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_steps)
    for step in range(max_steps):
        assert lr_factor(settings, step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_learning_rates_by_hand() -> None:
    def factors(**settings: Any) -> list[float]:
        return [lr_factor(config(max_steps=6, **settings), step) for step in range(6)]

    assert factors() == [1.0] * 6
    assert factors(warmup_steps=2) == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert factors(lr_scheduler_type="linear", warmup_steps=2) == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("name", architectures.each())
def test_what_decays_is_what_transformers_trainer_decays(name: str) -> None:
    from transformers import Trainer

    model = architectures.make(name)
    wanted = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it needs no trainer
    groups = parameter_groups(model, config(weight_decay=0.3))
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = dict(model.named_parameters())
    assert decays.keys() == {id(parameter) for parameter in found.values()}
    assert sum(len(group["params"]) for group in groups) == len(found), "each of them once"
    assert {key for key, parameter in found.items() if decays[id(parameter)] == 0.3} == wanted & found.keys()
    assert {decays[id(parameter)] for key, parameter in found.items() if key not in wanted} <= {0.0}
    whole = parameter_groups(model, config(weight_decay=0.3, decay_biases_and_norms=True))
    assert [(len(group["params"]), group["weight_decay"]) for group in whole] == [(len(found), 0.3)]


def test_only_what_is_trained_is_given() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1, bias=False)).requires_grad_(False)
    model[0].requires_grad_(True)
    groups = parameter_groups(model, config())
    assert [(group["params"], group["weight_decay"]) for group in groups] == [
        ([model[0].weight], 0.05),
        ([model[0].bias], 0.0),
    ]


@pytest.mark.parametrize("decays", [False, True])
def test_norms_shrink_only_where_the_recipe_says_so(tmp_path: Path, tiny_model: Path, decays: bool) -> None:
    bench = Bench(tmp_path, tiny_model)
    # So large an ε that the gradients move nothing, and decay alone is left: (1 − learning_rate·decay)² in two steps.
    settings = {"learning_rate": 1e-2, "weight_decay": 10.0, "adam_epsilon": 1e12, "decay_biases_and_norms": decays}
    trained = weights(bench.train("mle", max_steps=2, **settings))
    before = weights(bench.train("mle", max_steps=1, learning_rate=1e-30))
    for name, tensor in before.items():
        share = 0.81 if decays or "norm" not in name else 1.0
        torch.testing.assert_close(trained[name], tensor * share, rtol=1e-5, atol=1e-7)
