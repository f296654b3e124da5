"""How a system writes: top-p and beam search are those of transformers, and specs name only what is not off."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines import transformers
from cpo_pipe.pipeline.engines.base import Request, Sampling
from cpo_pipe.pipeline.engines.decoding import SeededChoice
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from tests.support.answers import answers
from tests.support.architectures import make, openai_gpt
from tests.support.marks import slow_except

PROMPT = [5, 6, 7]
CPU = torch.device("cpu")


def sampling(**settings: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "top_k": 0, "max_new_tokens": 1, "stop_ids": (), **settings})


def searching(beams: int = 4, **settings: Any) -> Sampling:
    return sampling(**{"temperature": 0, "beams": beams, "max_new_tokens": 12, "stop_ids": STOPS, **settings})


STOPS = tuple(range(0, 300, 9))
"""With the models here some continuations end and others do not."""


@pytest.fixture
def open_(tmp_path: Path) -> Callable[[Path], TransformersEngine]:
    return lambda folder: TransformersEngine(locate_model(str(folder), Store(tmp_path / "store")))


# ── specs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_spec_names_only_what_is_on() -> None:
    """The first two are those of rows made before there was anything else."""
    common = {"max_new_tokens": 1, "stop_ids": [0, 3]}
    ends = {"stop_ids": (3, 0)}
    assert sampling(top_k=9, **ends).spec() == {"temperature": 1.0, "top_k": 9, **common}
    assert sampling(temperature=0, top_k=9, top_p=0.5, **ends).spec() == {"temperature": 0, **common}
    assert sampling(top_p=0.5, **ends).spec() == {"temperature": 1.0, "top_k": 0, "top_p": 0.5, **common}
    assert sampling(temperature=0, beams=3, **ends).spec() == {"temperature": 0, "beams": 3, **common}


# ── top-p ────────────────────────────────────────────────────────────────────────────────────────────────────────


def chosen(scores_V: torch.Tensor, wanted: Sampling, draws: int) -> torch.Tensor:
    """How often each token is drawn, by as many uniform numbers that are equally far from each other; (V,)."""
    choice = SeededChoice([0], wanted, CPU)
    choice._uniform_BT = ((torch.arange(draws, dtype=torch.float64) + 0.5) / draws)[:, None]
    tokens = choice.choose(scores_V.expand(draws, -1), torch.arange(draws), 0)
    return torch.bincount(tokens, minlength=len(scores_V))


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)])
def test_the_fewest_tokens_that_reach_p_are_kept(p: float, kept: int) -> None:
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    counts = chosen(probabilities.log(), sampling(top_p=p), 1000)
    largest = probabilities.sort(descending=True).indices[:kept]
    assert set(counts.nonzero().squeeze(-1).tolist()) == set(largest.tolist())
    expected = torch.zeros(4).scatter(0, largest, probabilities[largest] / probabilities[largest].sum() * 1000)
    assert (counts - expected).abs().max() <= 1


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.parametrize("p", [0.2, 0.8, 0.95, 1.0])
def test_the_distribution_is_that_of_the_filters_of_transformers(temperature: float, k: int, p: float) -> None:
    draws = 100_000
    filters = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(p)])
    if k:
        filters.insert(1, TopKLogitsWarper(k))
    for seed in range(3):
        scores = torch.randn(20, generator=torch.Generator().manual_seed(seed))
        expected = filters(torch.tensor([PROMPT]), scores[None])[0].double().softmax(-1)
        counts = chosen(scores, sampling(temperature=temperature, top_k=k, top_p=p), draws)
        assert expected[expected > 0].min() > 1 / draws, "or a kept token might not be drawn"
        assert torch.equal(counts > 0, expected > 0)
        assert (counts / draws - expected).abs().max() <= 1 / draws + 1e-6


def test_samples_of_a_model_follow_its_filtered_distribution(
    open_: Callable[[Path], TransformersEngine], tiny_model: Path
) -> None:
    draws, wanted = 4000, sampling(temperature=0.9, top_k=40, top_p=0.8)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[:, -1]
    filters = [TemperatureLogitsWarper(0.9), TopKLogitsWarper(40), TopPLogitsWarper(0.8)]
    expected = LogitsProcessorList(filters)(torch.tensor([PROMPT]), logits)[0].double().softmax(-1)
    (samples,) = answers(open_(tiny_model), [Request(PROMPT, draws, 1 << 20)], wanted)
    counts = Counter(sample.token_ids[0] for sample in samples)
    kept = expected.nonzero().squeeze(-1).tolist()
    assert 2 < len(kept) < 40
    assert set(counts) == set(kept)
    assert chisquare([counts[token] for token in kept], (expected[kept] * draws).tolist()).pvalue > 1e-3
    raw = logits[0].log_softmax(-1)
    assert all(sample.logprob == pytest.approx(raw[sample.token_ids[0]].item(), rel=1e-4) for sample in samples[:50])


def test_each_row_keeps_its_own_random_numbers(open_: Callable[[Path], TransformersEngine], tiny_model: Path) -> None:
    engine, wanted = open_(tiny_model), sampling(top_p=0.9, max_new_tokens=10, stop_ids=STOPS)
    requests = [Request([5 + n, *PROMPT][: 1 + n % 4], 3, n << 16) for n in range(6)]
    together = [[sample.token_ids for sample in samples] for samples in answers(engine, requests, wanted)]
    alone = [
        [answers(engine, [Request(request.prompt_ids, 1, request.seed + k)], wanted)[0][0].token_ids for k in range(3)]
        for request in requests
    ]
    assert together == alone
    assert len({tuple(token_ids) for samples in together for token_ids in samples}) > 6


# ── beam search ──────────────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = [[7], PROMPT, [9, 4, 11], [*range(10, 30)], [8, 2], [*range(40, 65)]]


def assert_search_is_that_of_transformers(engine: TransformersEngine, folder: Path, wanted: Sampling) -> set[str]:
    """Token for token, with the log-probs of a forward pass; returns why the texts end."""
    network: Any = AutoModelForCausalLM.from_pretrained(folder)
    network.generation_config.eos_token_id = None
    samples = [sample for (sample,) in answers(engine, [Request(prompt, 1, 0) for prompt in PROMPTS], wanted)]
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        stops, ids = list(wanted.stop_ids), torch.tensor([prompt])
        found = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=wanted.beams,
            do_sample=False,
            max_new_tokens=wanted.max_new_tokens,
            pad_token_id=0,
            **({"eos_token_id": stops} if stops else {}),
        )
        assert sample.token_ids == found[0, len(prompt) :].tolist()
        ended = sample.token_ids[-1] in stops
        assert sample.finish_reason == ("stop" if ended else "length")
        assert ended or len(sample.token_ids) == wanted.max_new_tokens
        with torch.no_grad():
            logprobs = (
                network(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        expected = logprobs.gather(-1, torch.tensor(sample.token_ids)[:, None]).sum().item()
        assert sample.logprob == pytest.approx(expected, rel=1e-4, abs=1e-5)
    return {sample.finish_reason for sample in samples}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", slow_except([2, 5], 2))
def test_beam_search_is_that_of_transformers(
    open_: Callable[[Path], TransformersEngine],
    new_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    beams: int,
) -> None:
    folder = new_model(architecture=architecture, seed=3)
    engine = open_(folder)
    assert assert_search_is_that_of_transformers(engine, folder, searching(beams)) == {"stop", "length"}
    assert assert_search_is_that_of_transformers(engine, folder, searching(beams, stop_ids=())) == {"length"}
    monkeypatch.setattr(transformers, "BATCH_TOKENS", 100)
    rows: list[int] = []
    engine._decoder.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: rows.append(len(inputs[0]))
    )
    assert_search_is_that_of_transformers(engine, folder, searching(beams))
    assert max(rows) == max(beams, 100 // (1 + 12) // beams * beams), "beams count among the rows side by side"


@pytest.mark.parametrize("name", ["Mamba (state space)", "Mistral, window 16", None])
def test_beam_search_with_caches_of_other_kinds_and_with_none(
    open_: Callable[[Path], TransformersEngine], tmp_path: Path, name: str | None
) -> None:
    (make(name) if name else openai_gpt()).save_pretrained(tmp_path / "model")
    assert_search_is_that_of_transformers(open_(tmp_path / "model"), tmp_path / "model", searching(3))


def test_beams_for_every_token_find_the_likeliest_text(
    open_: Callable[[Path], TransformersEngine], tiny_model: Path
) -> None:
    """Two tokens: all pairs are computed, and the best of them is what a search with a beam for each token finds."""
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        rows = torch.tensor([[*PROMPT, token] for token in range(300)])
        logprobs = network(rows).logits.log_softmax(-1)
    pairs = logprobs[:, 2].gather(-1, torch.arange(300)[:, None]) + logprobs[:, 3]
    best = divmod(int(pairs.argmax()), 300)
    wanted = searching(300, max_new_tokens=2, stop_ids=())
    ((sample,),) = answers(open_(tiny_model), [Request(PROMPT, 1, 0)], wanted)
    assert tuple(sample.token_ids) == best
    assert sample.logprob == pytest.approx(pairs.max().item(), rel=1e-5)
    greedy = sampling(temperature=0, max_new_tokens=2)
    assert answers(open_(tiny_model), [Request(PROMPT, 1, 0)], greedy)[0][0].logprob < sample.logprob


def test_beam_search_has_one_answer(open_: Callable[[Path], TransformersEngine], tiny_model: Path) -> None:
    with pytest.raises(AssertionError):
        answers(open_(tiny_model), [Request(PROMPT, 2, 0)], searching())
    with pytest.raises(AssertionError):
        sampling(beams=2)
