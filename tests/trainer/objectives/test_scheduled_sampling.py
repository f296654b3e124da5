"""Parallel scheduled sampling: what is drawn, what is mixed, and the step against a naive loop."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from cpo_pipe.data.fingerprint import digest
from cpo_pipe.trainer.groups import Group
from cpo_pipe.trainer.objectives.pss import PSS
from cpo_pipe.trainer.scoring.attention import AttentionBackend
from cpo_pipe.trainer.scoring.group_table import TokenGroup
from cpo_pipe.trainer.scoring.head import Head, draw
from cpo_pipe.trainer.scoring.prefix_tree import Labels, Packed
from cpo_pipe.trainer.scoring.scorer import Scorer
from tests.support.architectures import make
from tests.support.training import CANDIDATES, Bench, measured, metrics, naive_decay, naive_logprob, weights

GROUPS = [Group(name, prompt, candidates[:1], None, []) for name, (prompt, candidates, _) in CANDIDATES.items()]
TARGETS = [(group.prompt_ids, group.candidates) for group in GROUPS]


def test_a_token_is_drawn_where_its_uniform_number_falls() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]).log()
    uniform = torch.tensor([[0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-9]] * 2, dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [[0, 0, 1, 1, 2, 2], [0] * 6]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    uniform = torch.from_numpy(np.random.default_rng(0).random((1, 20_000)))
    counts = np.bincount(draw(probabilities.log()[None], uniform)[0], minlength=5)
    assert stats.chisquare(counts, 20_000 * probabilities.double().numpy()).pvalue > 0.01


@pytest.mark.parametrize(("scale", "cap", "bias"), [(1.0, None, False), (0.5, 3.0, True)])
def test_the_head_draws_from_its_own_distribution(scale: float, cap: float | None, bias: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8), torch.randn(50, 8)
    offset = torch.randn(50) if bias else None
    logits = scale * (hidden @ weight.t() + (offset if offset is not None else 0))
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    uniform = torch.rand(7, 400, dtype=torch.float64)
    assert torch.equal(Head(scale, cap).sample(hidden, weight, offset, uniform), draw(logits, uniform))


@pytest.mark.parametrize("attention", ["packed", "padded", "plain"])
def test_what_is_drawn_depends_on_the_step_and_the_example_alone(attention: AttentionBackend) -> None:
    scorer = Scorer(make("Llama, untied"))
    scorer.set_attention(attention)

    def mixed(step: int, groups: list[Group], replace: float = 0.5) -> dict[str, list[list[int]]]:
        texts: list[TokenGroup] = []

        def pack(groups: Sequence[TokenGroup], labels: Labels | None = None) -> Packed:
            texts[:] = groups
            return scorer.pack(groups, labels)

        PSS(init="m", objective="pss", seed=3, sequences=2, replace=replace).inputs(groups, step, pack, scorer)
        return {group.example_id: inputs for group, (_, inputs) in zip(groups, texts, strict=True)}

    one = mixed(4, GROUPS)
    assert mixed(4, GROUPS[::-1]) == one
    assert mixed(4, GROUPS[1:2]) == {"b": one["b"]}
    assert mixed(5, GROUPS) != one
    assert mixed(4, GROUPS, replace=0) == {group.example_id: group.candidates * 2 for group in GROUPS}
    # Each drawn token is the model's own after the true ones before it.
    drawn = mixed(4, GROUPS, replace=1)
    for group in GROUPS:
        random = np.random.default_rng(int(digest([3, 4, group.example_id], 32), 16))
        uniform = torch.from_numpy(random.random((2, len(group.candidates[0]), 2)))
        with scorer.own_attention() as model:
            logits = model(torch.tensor([group.prompt_ids + group.candidates[0]])).logits[0]
        expected = draw(logits[len(group.prompt_ids) - 1 : -1], uniform[0])
        assert drawn[group.example_id] == expected.T.tolist()
        taken = uniform[1] < 0.5
        gold = torch.tensor(group.candidates[0])[:, None].expand_as(expected)
        assert one[group.example_id] == torch.where(taken, expected, gold).T.tolist()


@pytest.mark.parametrize("attention", ["cascade", "split", "dense", "packed", "padded", "plain"])
def test_labels_are_predicted_after_other_inputs(attention: AttentionBackend) -> None:
    model = make("Llama, untied")
    scorer = Scorer(model)
    scorer.set_attention(attention)
    prompt, inputs, labels = [5, 6, 7], [[9, 10, 11, 0], [9, 10, 30, 0], [9, 12, 1, 2]], [[20, 21, 22, 0]] * 3
    (found,) = scorer.pack([(prompt, inputs)], [labels]).per_group(scorer(scorer.pack([(prompt, inputs)], [labels])))
    for row, ids in zip(found, inputs, strict=True):
        with scorer.own_attention() as own:
            logprobs = own(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert row.item() == pytest.approx(logprobs[torch.arange(4), torch.tensor(labels[0])].sum().item(), rel=1e-5)


def naive_loss(model: Any, step: int, sequences: int, replace: float) -> torch.Tensor:
    """Written out, one target, one sequence and one token at a time."""
    nll, tokens = torch.zeros(()), 0
    for name, (prompt, (target, *_), _) in CANDIDATES.items():
        random = np.random.default_rng(int(digest([0, step, name], 32), 16)).random((2, len(target), sequences))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0]
        for m in range(sequences):
            inputs = list(prompt)
            for t, token in enumerate(target):
                chances = logits[len(prompt) + t - 1].double().softmax(-1).cumsum(-1)
                own = int((chances <= random[0, t, m]).sum())
                inputs.append(own if random[1, t, m] < replace else token)
            given = model(torch.tensor([inputs[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
            nll = nll - sum(given[t, token] for t, token in enumerate(target)) / sequences
        tokens += len(target)
    return nll / tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_step_is_that_of_a_naive_loop(tmp_path: Path, new_model: Callable[..., Path], architecture: str) -> None:
    bench = Bench(tmp_path, new_model(architecture=architecture))
    learning_rate = (
        9e-4  # at 1e-3 a uniform number of the third step lies so near to a bound that rounding decides the draw
    )
    artifact = bench.train("pss", max_steps=3, sequences=3, replace=0.5, learning_rate=learning_rate)
    model = AutoModelForCausalLM.from_pretrained(bench.model.path).eval()
    optimizer = torch.optim.AdamW(naive_decay(model, 0.05), lr=learning_rate)
    losses = []
    for step in range(3):
        loss = naive_loss(model, step, 3, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [row["loss"] for row in metrics(artifact)] == pytest.approx(losses, rel=1e-4)
    trained = weights(artifact)
    for name, parameter in model.named_parameters():
        if "c_attn.bias" not in name:  # keys' biases change no log-prob: AdamW makes steps of the rounding of their 0
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-5)


def test_validation_targets_are_measured_without_draws(bench: Bench) -> None:
    made, plain = (bench.train(name, max_steps=1, validation=2, eval_steps=1) for name in ("pss", "mle"))
    assert metrics(made)[0]["loss"] != metrics(plain)[0]["loss"]
    # After the first step, which the draws change: as near as one small step, and far from what draws cost.
    model = AutoModelForCausalLM.from_pretrained(made.path)
    ids = sorted(bench.candidates, key=lambda name: hashlib.sha256(f"held out {name}".encode()).digest())[:2]
    pairs = [(bench.candidates[name][0], bench.candidates[name][1][0]) for name in ids]
    nll = -sum(naive_logprob(model, *pair).item() for pair in pairs) / sum(len(target) for _, target in pairs)
    assert measured(made, "validation_loss")[1] == pytest.approx(nll, rel=1e-5)


def test_nothing_replaced_is_mle(bench: Bench) -> None:
    pss, mle = bench.train("pss", replace=0.0, sequences=1), bench.train("mle")
    assert [row["loss"] for row in metrics(pss)] == [row["loss"] for row in metrics(mle)]
    one, other = weights(pss), weights(mle)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_by_hand(bench: Bench) -> None:
    """A model that says 4 wherever it is: all inputs become 4, and the labels stay what they were."""
    model = AutoModelForCausalLM.from_pretrained(bench.model.path)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are 0: every token has the same chance
    model.save_pretrained(bench.model.path)
    vocabulary = model.config.vocab_size
    fresh = Bench(bench.store.root.parent / "other", bench.model.path)
    row = metrics(fresh.train("pss", max_steps=1, replace=1.0))[0]
    assert row["loss"] == pytest.approx(math.log(vocabulary), rel=1e-5)


@pytest.fixture
def bench(tmp_path: Path, new_model: Callable[..., Path]) -> Bench:
    return Bench(tmp_path, new_model(seed=9))
