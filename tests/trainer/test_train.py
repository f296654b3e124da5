"""Training: the step against a naive loop, and what it is trained on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import InputError, RunError
from tests.support.marks import slow_except
from tests.support.training import CANDIDATES, Bench, metrics, naive_decay, naive_logprob, weights


def naive_loss(model: Any, frozen: Any, objective: str, beta: float, mle_weight: float) -> torch.Tensor:
    """Eqs. 1 and 2 and the MLE loss, written out one group and one term at a time."""
    listwise, nll, tokens = [], torch.zeros(()), 0
    for prompt, candidates, ranks in CANDIDATES.values():
        policy = [naive_logprob(model, prompt, ids) for ids in candidates]
        with torch.no_grad():
            reference = [naive_logprob(frozen, prompt, ids) for ids in candidates]
        rewards = [beta * (p - r) for p, r in zip(policy, reference, strict=True)]
        if objective == "cpo":
            listwise.append(-(rewards[0] - torch.stack(rewards).logsumexp(0)))
        else:
            order = [ranks.index(k) for k in range(len(ranks))]
            terms = [
                rewards[j] - torch.stack([rewards[i] for i in order[k:]]).logsumexp(0) for k, j in enumerate(order)
            ]
            listwise.append(-torch.stack(terms).sum())
        nll, tokens = nll - policy[0], tokens + len(candidates[0])
    if objective == "mle":
        return nll / tokens
    return torch.stack(listwise).mean() + mle_weight * nll / tokens


@pytest.mark.parametrize(("objective", "mle_weight"), [("cpo", 0.0), ("cpo-ranked", 0.0), ("cpo", 0.7), ("mle", 0.0)])
@pytest.mark.parametrize("budget", slow_except([1, 40, 8192], 40))
def test_the_step_equals_that_of_a_naive_loop(bench: Bench, objective: str, mle_weight: float, budget: int) -> None:
    listwise = {} if objective == "mle" else {"beta": 0.5, "mle_weight": mle_weight}
    artifact = bench.train(objective, max_steps=3, micro_batch_tokens=budget, weight_decay=0.05, **listwise)
    model, frozen = (AutoModelForCausalLM.from_pretrained(bench.model.path).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(naive_decay(model, 0.05), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = naive_loss(model, frozen, objective, 0.5, mle_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [row["loss"] for row in metrics(artifact)] == pytest.approx(losses, rel=1e-4)
    trained = weights(artifact)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-5)


def test_groups_without_negatives_do_not_count_in_the_listwise_loss(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model, CANDIDATES | {"e": ([3, 4], [[5, 0]], [0])})
    first = metrics(bench.train("cpo", batch_size=4, max_steps=1, beta=5.0))[0]
    assert first["loss"] == pytest.approx(np.mean([math.log(k) for k in (4, 2, 3, 3)]), abs=1e-3)
    with_mle = bench.train("cpo", batch_size=5, max_steps=1, mle_weight=1.0)
    assert with_mle.manifest["groups"] == 5
    # The listwise loss is the mean over the four groups with negatives, the MLE loss over all five.
    assert metrics(with_mle)[0]["preference_loss"] == pytest.approx(
        np.mean([math.log(k) for k in (4, 2, 3, 3)]), abs=1e-3
    )
    alone = Bench(tmp_path / "alone", tiny_model, {"e": ([3, 4], [[5, 0]], [0])})
    with pytest.raises(InputError, match="nothing to train on"):
        alone.train("cpo")


def test_only_selected_examples_are_trained_on(bench: Bench) -> None:
    bench.groups()
    bench.candidates = {name: CANDIDATES[name] for name in ("b", "c")}
    assert bench.train("cpo").manifest["groups"] == 2


def test_length_normalize_divides_both_logprobs(bench: Bench) -> None:
    artifact = bench.train("cpo", length_normalize=True, max_steps=1, beta=2.0, learning_rate=2e-4)
    second = metrics(bench.train("cpo", length_normalize=True, max_steps=2, beta=2.0, learning_rate=2e-4))[1]
    after, before = (AutoModelForCausalLM.from_pretrained(path) for path in (artifact.path, bench.model.path))
    losses = []
    with torch.no_grad():
        for prompt, candidates, _ in CANDIDATES.values():
            rewards = [
                2.0 * (naive_logprob(after, prompt, ids) - naive_logprob(before, prompt, ids)) / len(ids)
                for ids in candidates
            ]
            losses.append(float(torch.stack(rewards).logsumexp(0) - rewards[0]))
    assert second["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_example_longer_than_the_context_is_refused_before_any_work(
    tmp_path: Path, new_model: Callable[..., Path], architecture: str
) -> None:
    candidates = {"long": ([5] * 100, [[6] * 29, [7]], [0, 1])}
    bench = Bench(tmp_path, new_model(architecture=architecture), candidates)
    with pytest.raises(InputError, match=r"example long has 129 tokens and the context of .* is 128"):
        bench.train("cpo")
    assert not list(bench.store.root.glob("reference-logprobs/*/shards/*"))


def test_groups_whose_token_ids_differ_from_the_examples_are_refused(bench: Bench) -> None:
    bench.groups()
    prompt, candidates, ranks = CANDIDATES["b"]
    bench.candidates = CANDIDATES | {"b": (prompt, [candidates[0][:-1], candidates[1]], ranks)}
    with pytest.raises(RunError, match="group of example b has other token ids"):
        bench.train("cpo")


def test_a_training_that_diverges_leaves_no_checkpoint(bench: Bench) -> None:
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step \d+, because of groups? |norm is (nan|inf)"):
        bench.train("mle", max_steps=30, learning_rate=1e30)
    assert not list(bench.store.root.glob("checkpoints/*/model.safetensors"))


def test_validation_may_not_take_every_group_with_a_negative(tmp_path: Path, tiny_model: Path) -> None:
    alone = {"e": ([3, 4], [[5, 0]], [0])}
    bench = Bench(tmp_path, tiny_model, {"a": CANDIDATES["a"], **alone})
    with pytest.raises(InputError, match=r"no group with a negative is left to train on; lower train\.t\.validation"):
        bench.train("cpo", mle_weight=1.0, validation=1)
