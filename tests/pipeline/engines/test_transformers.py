"""The transformers engine: prompts computed once give the samples of prompts computed anew, on every architecture."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines import transformers
from cpo_pipe.pipeline.engines.base import Request, Sample, Sampling, SamplingDtype, check_context, torch_dtype
from cpo_pipe.pipeline.engines.decoding import PLAIN, Batching, GivenChoice
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from tests.support.answers import answers
from tests.support.architectures import VOCABULARY, each, make, openai_gpt

FASTEST, ONE_LENGTH = Batching(share=True, pad=True), Batching(share=True, pad=False)
SAMPLING = Sampling(temperature=1.0, top_k=20, max_new_tokens=20, stop_ids=tuple(range(0, VOCABULARY, 12)))
"""With most models rows end at different places, within segments and after them."""
PROMPTS = [[7], [*range(10, 17)], [*range(20, 45)]]
"""One with nothing to share, and one longer than a window of 16."""
REQUESTS = [Request(prompt, 4, number << 16) for number, prompt in enumerate([*PROMPTS, PROMPTS[1]])]


@pytest.fixture
def open_(tmp_path: Path) -> Callable[[PreTrainedModel], TransformersEngine]:
    def found(network: PreTrainedModel) -> TransformersEngine:
        network.save_pretrained(tmp_path / "model")
        return TransformersEngine(locate_model(str(tmp_path / "model"), Store(tmp_path / "store")))

    return found


@pytest.fixture
def llama(tiny_model: Path, tmp_path: Path) -> Model:
    return locate_model(str(tiny_model), Store(tmp_path / "store"))


def plainly(engine: TransformersEngine, requests: list[Request], sampling: Sampling = SAMPLING) -> list[list[Sample]]:
    """One row at a time, its prompt computed anew."""
    batching, engine._decoder.batching = engine._decoder.batching, PLAIN
    samples = [
        [answers(engine, [Request(request.prompt_ids, 1, request.seed + k)], sampling)[0][0] for k in range(request.n)]
        for request in requests
    ]
    engine._decoder.batching = batching
    return samples


def assert_same(found: list[list[Sample]], expected: list[list[Sample]]) -> None:
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    assert [a.token_ids for a, _ in pairs] == [b.token_ids for _, b in pairs]
    assert [a.finish_reason for a, _ in pairs] == [b.finish_reason for _, b in pairs]
    assert [a.logprob for a, _ in pairs] == pytest.approx([b.logprob for _, b in pairs], rel=1e-4)


@pytest.mark.parametrize("name", each())
def test_samples_are_those_of_rows_computed_alone(
    open_: Callable[[PreTrainedModel], TransformersEngine], name: str
) -> None:
    engine = open_(make(name))
    assert engine._decoder.batching == (ONE_LENGTH if name == "Mamba (state space)" else FASTEST)
    found = answers(engine, REQUESTS, SAMPLING)
    assert_same(found, plainly(engine, REQUESTS))


def test_a_model_without_a_cache_goes_the_plain_way_and_says_why(
    open_: Callable[[PreTrainedModel], TransformersEngine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine = open_(openai_gpt())
    assert engine._decoder.batching == PLAIN
    assert "every sample computes its own prompt" in caplog.text
    assert "not used by the model: ['past_key_values']" in caplog.text
    assert_same(answers(engine, REQUESTS, SAMPLING), plainly(engine, REQUESTS))


def test_a_cache_that_is_copied_wrongly_is_not_shared(
    llama: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    copy = DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda cache, rows: copy(cache, torch.zeros_like(rows)))
    assert TransformersEngine(llama)._decoder.batching != FASTEST
    assert "otherwise log-probs were wrong by" in caplog.text


def test_a_prompt_is_computed_once_and_rows_that_ended_no_more(llama: Model) -> None:
    engine, prompt, n = TransformersEngine(llama), [*range(5, 45)], 11
    steps: list[tuple[int, ...]] = []
    hook = engine._decoder.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: steps.append(tuple(inputs[0].shape))
    )
    endless = Sampling(temperature=1.0, top_k=50, max_new_tokens=20, stop_ids=())
    answers(engine, [Request(prompt, 5, 0), Request(prompt, n - 5, 1 << 20)], endless)
    assert steps == [(1, len(prompt) - 1)] + [(n, 1)] * 20
    steps.clear()
    some = Sampling(temperature=1.0, top_k=50, max_new_tokens=20, stop_ids=tuple(range(0, 300, 10)))
    (samples,) = answers(engine, [Request(prompt, n, 0)], some)
    hook.remove()
    going = [sum(len(sample.token_ids) > step for sample in samples) for step in (0, 8, 16)]
    assert [rows for rows, _ in steps[1:]] == [going[0]] * 8 + [going[1]] * 8 + [going[2]] * (len(steps) - 17)
    assert going[0] > going[1] > going[2]


def test_rows_side_by_side_are_bounded_and_change_nothing(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(llama)
    at_once = answers(engine, REQUESTS, SAMPLING)
    monkeypatch.setattr(transformers, "BATCH_TOKENS", 100)
    sizes: list[int] = []
    engine._decoder.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: sizes.append(len(inputs[0]))
    )
    assert_same(answers(engine, REQUESTS, SAMPLING), at_once)
    assert sizes[:2] == [1, 100 // (25 + 20)], "the longest come first"
    assert max(sizes) == 100 // (7 + 20), "and the shortest beside others"


@pytest.mark.parametrize(
    ("longest", "new_tokens", "fix"),
    [
        (100, 50, "lower evaluate.max_new_tokens to 28 or less, or data.max_prompt_tokens to 78 or less"),
        (100, 128, "lower evaluate.max_new_tokens to 28 or less"),
        (128, 100, "lower data.max_prompt_tokens to 28 or less"),
        (130, 128, "lower both evaluate.max_new_tokens and data.max_prompt_tokens, to 128 together"),
    ],
)
def test_limits_that_are_advised_can_be_kept(llama: Model, longest: int, new_tokens: int, fix: str) -> None:
    selection = pa.table({"prompt_ids": [[1] * longest, [2]]})
    with pytest.raises(InputError) as error:
        check_context(selection, llama, new_tokens, "evaluate.max_new_tokens")
    assert str(error.value) == (
        f"evaluate.max_new_tokens is {new_tokens} and the longest prompt has {longest} tokens, but the context of "
        f"{llama.name} is 128 tokens; {fix}"
    )
    assert check_context(selection.slice(1), llama, 127, "evaluate.max_new_tokens") == 128


@pytest.mark.parametrize(("dtype", "shown"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_dtype_is_that_of_weights_and_provenance(llama: Model, dtype: SamplingDtype, shown: str) -> None:
    engine = TransformersEngine(llama, dtype=dtype)
    assert engine.description.endswith(f", {shown}")
    assert engine._decoder.model.dtype == getattr(torch, shown)


def test_in_bfloat16_log_probs_are_those_of_float32_up_to_its_rounding(llama: Model) -> None:
    exact, rounded = (TransformersEngine(llama, dtype=dtype)._decoder for dtype in ("float32", "bfloat16"))
    given = [[5, 9, 13, 2, 30, 7, 8, 40]]
    found = []
    for decoder in (exact, rounded):
        choice = GivenChoice(given, [], torch.device("cpu"))
        decoder._decode([(7, 8, 9)], choice, decoder.batching)
        found.append(choice.samples()[0].logprob)
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] != found[0]


def test_a_cpu_without_instructions_for_bfloat16_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert torch_dtype("bfloat16") == torch.bfloat16
        assert ("float32 may be faster" in caplog.text) == (not fast)
    caplog.clear()
    torch_dtype("float32")
    torch_dtype("auto")
    assert not caplog.text
