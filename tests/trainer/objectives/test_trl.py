"""The objectives on pairs beside TRL's, which computes log-probs, loss and gradients on its own."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_pipe.trainer.groups import Group
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Normalizers
from cpo_pipe.trainer.scoring.probes import Probes
from cpo_pipe.trainer.scoring.scorer import Scorer
from cpo_pipe.trainer.scoring.self_check import choose_backend

trl_side = pytest.importorskip("tests.support.trl_side", reason="trl is not installed")

PROMPT = [5, 6, 7, 8, 9, 10]
CANDIDATES = [[20, 21, 22, 0], [20, 23, 0], [30, 31, 32, 33, 34, 35, 0], [40, 0]]
REFERENCE = [-20.0, -14.0, -38.0, -11.0]
SCALE = 0.05
"""β: rewards of a few units, where no sigmoid is flat."""

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "dpo": ({"beta": SCALE}, {"loss_type": "sigmoid", "beta": SCALE}, 1),
    # TRL smooths the labels of aot, which is sigmoid's on a batch of one pair.
    "dpo, smoothed": (
        {"beta": SCALE, "label_smoothing": 0.2},
        {"loss_type": "aot", "beta": SCALE, "label_smoothing": 0.2},
        1,
    ),
    "apo-zero": ({"beta": SCALE}, {"loss_type": "apo_zero", "beta": SCALE}, 1),
    "apo-down": ({"beta": SCALE}, {"loss_type": "apo_down", "beta": SCALE}, 1),
    # TRL's hinge is max(0, 1 − β Δ) of log ratios: of log-probs, where the reference's are 0, and by δ = 1/β.
    "slic": ({"margin": 1 / SCALE}, {"loss_type": "hinge", "beta": SCALE}, 1 / SCALE),
}
"""By objective its settings, TRL's, and what TRL's loss is multiplied by to be ours."""


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_trls(
    name: str, architecture: str, new_model: Callable[..., Path], tmp_path: Path
) -> None:
    settings, theirs, factor = CASES[name]
    beta = theirs.pop("beta") if "beta" in (theirs := dict(theirs)) else 1.0
    of = name.partition(",")[0]
    with_reference = of != "slic"
    model = AutoModelForCausalLM.from_pretrained(new_model(architecture=architecture, seed=3)).eval()
    twin = copy.deepcopy(model)
    reference = REFERENCE if with_reference else [0.0] * len(CANDIDATES)

    step = trl_side.make_trl(
        twin,
        None,
        [(PROMPT, CANDIDATES)],
        [reference],
        beta,
        "pair" if "," in name else "group",
        False,
        False,
        disable_dropout=True,
        **theirs,
    )
    expected, _ = step(0)

    config = OBJECTIVES.parse(
        {"init": "m", "objective": of, **({"reference": "m"} if with_reference else {}), **settings}
    )
    group = Group("e", PROMPT, CANDIDATES, None, REFERENCE if with_reference else [])
    scorer = Scorer(model, "float32").eval()
    probes = Probes(((PROMPT, CANDIDATES),), (len(PROMPT) + 1, len(PROMPT) + 6), len(CANDIDATES), 40)
    choose_backend("test", scorer, probes, "auto")
    packed = scorer.pack([config.texts(group)])
    found = config.figures([group], packed.per_group(scorer(packed)))
    loss = config.loss(found, Normalizers.of([group]))
    loss.backward()

    assert loss.item() == pytest.approx(expected * factor, rel=1e-5)
    assert loss.item() > 0.01, "a loss that is not flat here"
    gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    assert largest > 1e-4
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad,
            gradients[key] * factor,
            rtol=1e-3,
            atol=1e-5 * largest * factor,
            msg=lambda m, k=key: f"{k}: {m}",
        )
