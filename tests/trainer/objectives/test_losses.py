"""Losses against values derived by hand and against naive, independent formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cpo_pipe.trainer.objectives.apo import apo_down_loss, apo_zero_loss
from cpo_pipe.trainer.objectives.cpo import cpo_loss, ranked_cpo_loss
from cpo_pipe.trainer.objectives.dpo import dpo_loss
from cpo_pipe.trainer.objectives.mle import mle_loss
from cpo_pipe.trainer.objectives.preference import GroupLosses, reward_accuracy, reward_margin
from cpo_pipe.trainer.objectives.slic import slic_loss

torch.manual_seed(0)


def full(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def rows(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def naive_plackett_luce(rewards: list[float], ranks: list[int]) -> float:
    """Eq. 2 read aloud: of the items at rank k or worse, the one at rank k is chosen."""
    item_at = {rank: item for item, rank in enumerate(ranks)}
    loss = 0.0
    for k in range(len(rewards)):
        rest = [math.exp(rewards[item_at[j]]) for j in range(k, len(rewards))]
        loss -= math.log(math.exp(rewards[item_at[k]]) / sum(rest))
    return loss


def test_cpo_by_hand() -> None:
    # rewards: β 2 · (1, 0, 0.5) = (2, 0, 1); −log e² / (e² + 1 + e)
    policy, reference = rows([[-1.0, -5.0, -3.5]]), rows([[-2.0, -5.0, -4.0]])
    losses = cpo_loss(policy, reference, full(1, 3), beta=2.0)
    assert losses.reward_GK.tolist() == [[2.0, 0.0, 1.0]]
    assert losses.loss_G.item() == pytest.approx(math.log(math.exp(2) + 1 + math.e) - 2)


def test_ranked_by_hand() -> None:
    # order 0, 2, 1 of rewards (ln 4, ln 1, ln 3): 4/8 · 3/4 · 1/1 = 3/8
    policy = rows([[math.log(4), 0.0, math.log(3)]])
    losses = ranked_cpo_loss(policy, torch.zeros(1, 3), torch.tensor([[0, 2, 1]]), full(1, 3), beta=1.0)
    assert losses.loss_G.item() == pytest.approx(-math.log(3 / 8))


def test_ranks_are_ranks_of_items_not_items_at_ranks() -> None:
    # A 3-cycle is not its own inverse: gathering by ranks instead of argsort gives another value.
    rewards, ranks = [0.3, -1.1, 2.0, 0.7], [0, 2, 3, 1]
    inverse = [ranks.index(k) for k in range(4)]
    assert inverse != ranks
    loss = ranked_cpo_loss(rows([rewards]), torch.zeros(1, 4), torch.tensor([ranks]), full(1, 4), beta=1.0)
    assert loss.loss_G.item() == pytest.approx(naive_plackett_luce(rewards, ranks))
    assert loss.loss_G.item() != pytest.approx(naive_plackett_luce(rewards, inverse), abs=1e-2)


@pytest.mark.parametrize("k", [1, 2, 4, 12])
def test_at_the_start(k: int) -> None:
    logps = torch.randn(3, k, dtype=torch.float64) * 100
    ranks = torch.arange(k).repeat(3, 1)
    assert cpo_loss(logps, logps, full(3, k), beta=5.0).loss_G.tolist() == pytest.approx([math.log(k)] * 3)
    ranked = ranked_cpo_loss(logps, logps, ranks, full(3, k), beta=5.0)
    assert ranked.loss_G.tolist() == pytest.approx([math.lgamma(k + 1)] * 3)


def test_two_candidates_are_dpo() -> None:
    policy = torch.randn(64, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(64, 2, dtype=torch.float64)
    chosen, rejected = (policy - reference).unbind(-1)
    dpo = -functional.logsigmoid(0.7 * (chosen - rejected))
    ranks = torch.tensor([[0, 1]]).repeat(64, 1)
    for losses in (
        cpo_loss(policy, reference, full(64, 2), beta=0.7),
        ranked_cpo_loss(policy, reference, ranks, full(64, 2), beta=0.7),
    ):
        torch.testing.assert_close(losses.loss_G, dpo)
        ours, theirs = (torch.autograd.grad(loss.sum(), policy, retain_graph=True)[0] for loss in (losses.loss_G, dpo))
        torch.testing.assert_close(ours, theirs)


def ragged() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes, widest = [4, 2, 1, 3], 4
    mask = torch.arange(widest) < torch.tensor(sizes)[:, None]
    ranks = torch.zeros(4, widest, dtype=torch.long)
    for row, order in enumerate([[0, 2, 3, 1], [0, 1], [0], [0, 2, 1]]):
        ranks[row, : len(order)] = torch.tensor(order)
    policy = torch.randn(4, widest, dtype=torch.float64)
    reference = torch.randn(4, widest, dtype=torch.float64)
    # What stands in the padding must not matter.
    policy[~mask], reference[~mask] = 1e4, -1e4
    return policy.requires_grad_(), reference, ranks, mask


def test_ragged_equals_groups_one_by_one() -> None:
    policy, reference, ranks, mask = ragged()
    batched = [
        cpo_loss(policy, reference, mask, beta=3.0).loss_G,
        ranked_cpo_loss(policy, reference, ranks, mask, beta=3.0).loss_G,
    ]
    for row, k in enumerate(mask.sum(-1).tolist()):
        one, ref, rank = policy[row : row + 1, :k], reference[row : row + 1, :k], ranks[row : row + 1, :k]
        alone = [
            cpo_loss(one, ref, full(1, k), beta=3.0).loss_G,
            ranked_cpo_loss(one, ref, rank, full(1, k), beta=3.0).loss_G,
        ]
        for whole, single in zip(batched, alone, strict=True):
            torch.testing.assert_close(whole[row : row + 1], single)
            gradients = [torch.autograd.grad(x.sum(), policy, retain_graph=True)[0] for x in (whole[row], single)]
            torch.testing.assert_close(*gradients)
    assert batched[0][2].item() == 0
    assert batched[1][2].item() == 0


def test_gradients_are_those_of_the_loss() -> None:
    policy, reference, ranks, mask = ragged()
    with torch.no_grad():
        policy.masked_fill_(~mask, 0)
    assert torch.autograd.gradcheck(lambda p: cpo_loss(p, reference, mask, beta=0.5).loss_G, policy)
    assert torch.autograd.gradcheck(lambda p: ranked_cpo_loss(p, reference, ranks, mask, beta=0.5).loss_G, policy)


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_large_rewards_stay_finite(scale: float) -> None:
    policy = (torch.randn(2, 12) * scale).requires_grad_()
    mask = full(2, 12)
    mask[1, 5:] = False
    ranks = torch.arange(12).repeat(2, 1)
    for loss in (
        cpo_loss(policy, torch.zeros(2, 12), mask, beta=5.0).loss_G,
        ranked_cpo_loss(policy, torch.zeros(2, 12), ranks, mask, beta=5.0).loss_G,
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), policy, retain_graph=True)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert (gradient[1, 5:] == 0).all()


# ── objectives on pairs ──────────────────────────────────────────────────────────────────────────────────────────────

Pairwise = Callable[[Tensor, Tensor, Tensor], GroupLosses]
PAIRWISE: dict[str, Pairwise] = {
    "dpo": lambda p, r, m: dpo_loss(p, r, m, beta=0.7),
    "smoothed dpo": lambda p, r, m: dpo_loss(p, r, m, beta=0.7, label_smoothing=0.2),
    "slic": lambda p, r, m: slic_loss(p, m, margin=0.4),
    "apo-zero": lambda p, r, m: apo_zero_loss(p, r, m, beta=0.7),
    "apo-down": lambda p, r, m: apo_down_loss(p, r, m, beta=0.7),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairs_by_hand() -> None:
    # β 2, log ratios (0.5, −0.25, 1): rewards (1, −0.5, 2), so the target leads by 1.5 and −1.
    policy, reference = rows([[-1.0, -5.25, -2.0]]), rows([[-1.5, -5.0, -3.0]])
    mask = full(1, 3)
    found = {
        "dpo": dpo_loss(policy, reference, mask, beta=2.0),
        "smoothed": dpo_loss(policy, reference, mask, beta=2.0, label_smoothing=0.1),
        "zero": apo_zero_loss(policy, reference, mask, beta=2.0),
        "down": apo_down_loss(policy, reference, mask, beta=2.0),
    }
    assert all(losses.reward_GK.tolist() == [[1.0, -0.5, 2.0]] for losses in found.values())
    logs = math.log(1 + math.exp(-1.5)), math.log(1 + math.e)
    flipped = math.log(1 + math.exp(1.5)), math.log(1 + math.exp(-1))
    expected = {
        "dpo": sum(logs) / 2,
        "smoothed": (0.9 * sum(logs) + 0.1 * sum(flipped)) / 2,
        "zero": 1 - sigmoid(1) + (sigmoid(-0.5) + sigmoid(2)) / 2,
        "down": 1 + sigmoid(1) - (sigmoid(1.5) + sigmoid(-1)) / 2,
    }
    assert {name: losses.loss_G.item() for name, losses in found.items()} == pytest.approx(expected)


def test_slic_by_hand() -> None:
    # Log-probs −1, −5.25, −2, δ 2: the first pair is apart by more than δ, the second lacks 1.
    losses = slic_loss(rows([[-1.0, -5.25, -2.0]]).requires_grad_(), full(1, 3), margin=2.0)
    assert losses.loss_G.item() == pytest.approx(0.5)
    assert losses.reward_GK.tolist() == [[-1.0, -5.25, -2.0]]
    policy = rows([[-1.0, -5.25, -2.0]]).requires_grad_()
    slic_loss(policy, full(1, 3), margin=2.0).loss_G.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [[-0.5, 0.0, 0.5]]


@pytest.mark.parametrize(("objective", "start"), [("dpo", math.log(2)), ("smoothed dpo", math.log(2)),
                                                  ("apo-zero", 1.0), ("apo-down", 1.0), ("slic", 0.4)])  # fmt: skip
def test_pairs_of_equal_models(objective: str, start: float) -> None:
    logps = (torch.randn(3, 1, dtype=torch.float64) * 100).expand(3, 4)
    assert PAIRWISE[objective](logps, logps, full(3, 4)).loss_G.tolist() == pytest.approx([start] * 3)


@pytest.mark.parametrize("objective", PAIRWISE)
def test_ragged_pairs_equal_the_mean_of_each_pair_alone(objective: str) -> None:
    policy, reference, _, mask = ragged()
    loss = PAIRWISE[objective]
    batched = loss(policy, reference, mask).loss_G
    for row, k in enumerate(mask.sum(-1).tolist()):
        pairs = [
            loss(policy[row : row + 1, [0, j]], reference[row : row + 1, [0, j]], full(1, 2)).loss_G
            for j in range(1, k)
        ]
        alone = torch.cat(pairs).mean() if pairs else batched[row] * 0
        torch.testing.assert_close(batched[row], alone)
        gradients = [torch.autograd.grad(value, policy, retain_graph=True)[0] for value in (batched[row], alone)]
        torch.testing.assert_close(*gradients)
    assert batched[2].item() == 0


@pytest.mark.parametrize("objective", PAIRWISE)
def test_gradients_of_pairs_are_those_of_the_loss(objective: str) -> None:
    policy, reference, _, mask = ragged()
    with torch.no_grad():
        policy.masked_fill_(~mask, 0)
    assert torch.autograd.gradcheck(lambda p: PAIRWISE[objective](p, reference, mask).loss_G, policy)


@pytest.mark.parametrize("objective", PAIRWISE)
def test_large_rewards_of_pairs_stay_finite(objective: str) -> None:
    policy = (torch.randn(2, 12) * 1e5).requires_grad_()
    mask = full(2, 12)
    mask[1, 5:] = False
    loss = PAIRWISE[objective](policy, torch.zeros(2, 12), mask).loss_G
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[1, 5:] == 0).all()


def test_reward_accuracy_is_strict_and_reward_margin_ignores_padding() -> None:
    rewards = rows([[0.0, 0.0, 0.0], [1.0, 0.5, 9.0], [2.0, 1.0, -3.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    assert reward_accuracy(rewards, mask).tolist() == [False, True, True]
    assert reward_accuracy(rewards, mask, torch.tensor([0.1, 0.6, 0.9])).tolist() == [False, False, True]
    assert reward_margin(rewards, mask).tolist() == pytest.approx([0.0, 0.5, 3.0])


def test_mle_is_the_negative_log_likelihood() -> None:
    assert mle_loss(torch.tensor([-2.0, -0.5])).tolist() == [2.0, 0.5]
