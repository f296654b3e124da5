"""The texts that a training samples to measure repetition."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_pipe.trainer.monitors import repetition
from cpo_pipe.trainer.samples import SAMPLES
from tests.support.training import Bench, measured, metrics, weights

SAMPLE_TOKENS = 64
"""Those of a real training; other tests take fewer."""


def test_samples_stay_within_the_models_context(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    # The prompt and its candidates fit; 64 tokens more would not, and GPT-2 has no positions for them.
    long = {f"{token}": ([token] * 110, [[6] * 9, [7]], [0, 1]) for token in range(8, 16)}
    bench = Bench(tmp_path, new_model(architecture="gpt2"), long)
    bench.sample_tokens = SAMPLE_TOKENS
    assert metrics(bench.train("cpo", max_steps=1))[0]["repetition"] is not None


def test_a_model_with_several_eos_tokens_can_be_sampled_from(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    bench = Bench(tmp_path, new_model(eos_token_id=[0, 5]))
    assert metrics(bench.train("cpo", max_steps=1))[0]["repetition"] is not None


@pytest.mark.slow
def test_samples_taken_together_are_those_taken_alone(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    folder = new_model(eos_token_id=list(range(0, 200, 9)))
    prompts = [[token, 7, token + 1][: 2 + token % 2] for token in range(10, 10 + SAMPLES)]
    groups = {str(number): (prompt, [[6], [8]], [0, 1]) for number, prompt in enumerate(prompts)}
    bench = Bench(tmp_path, folder, groups)
    bench.sample_tokens = SAMPLE_TOKENS
    model = AutoModelForCausalLM.from_pretrained(folder)
    alone = [
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=SAMPLE_TOKENS,
                       do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        for ids in prompts
    ]  # fmt: skip
    assert len({len(sample) for sample in alone}) > 1, "some end before others"
    assert 0 < repetition(alone) < 1
    assert metrics(bench.train("cpo", max_steps=1, learning_rate=1e-9))[0]["repetition"] == repetition(alone)


@pytest.mark.slow
def test_sampling_changes_nothing_of_the_training(tmp_path: Path, tiny_model: Path) -> None:
    often = Bench(tmp_path / "a", tiny_model).train("cpo", max_steps=4, eval_steps=1, gradient_checkpointing=True)
    seldom = Bench(tmp_path / "b", tiny_model).train("cpo", max_steps=4, eval_steps=100)
    assert list(measured(seldom, "repetition")) == [0, 4]
    assert list(measured(often, "repetition")) == [0, 1, 2, 3, 4]
    assert all(torch.equal(weights(often)[name], tensor) for name, tensor in weights(seldom).items())
