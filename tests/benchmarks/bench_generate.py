"""The stage `generate-negatives` against bare vLLM: as many rows a second as `LLM.generate` has with the same requests.

Starting the engine is left out on all sides. The stage also decodes the texts, which bare vLLM is spared, and writes
the rows.
"""

import importlib.util
import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import row_seed
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline import samples
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.generate import generate_negatives, plan_negatives
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from tests.support.models import make_model
from tests.support.pairs import write_jsonl

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

PROMPTS, N, NEW_TOKENS, ROUNDS = 128, 11, 64, 3
LLAMA = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
         "initializer_range": 0.05}  # fmt: skip


def texts() -> list[str]:
    """Prompts of about 100 tokens, of words of which many are tokens."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 7))) for _ in range(3000)]
    return [" ".join(rng.choices(words, k=rng.randrange(50, 70))) for _ in range(PROMPTS + 1)]


def write_model(folder: Path) -> None:
    """A Llama of 4.2M parameters, whose samples nearly all run into their limit, and a tokenizer of its size."""
    from transformers import AutoTokenizer

    make_model(folder, **LLAMA)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(folder).train_new_from_iterator(texts(), 2048).save_pretrained(folder)


@pytest.mark.parametrize("batch_size", [64])
def bench_autoregressive(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams, TokensPrompt

    from cpo_pipe.pipeline.engines.vllm import VllmEngine

    write_model(tmp_path / "model")
    store = Store(tmp_path / "store")
    model = locate_model(str(tmp_path / "model"), store)
    rows = [{"prompt": text, "target": "a target"} for text in texts()]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples = prepare(Pairs(source=str(source), tokenizer=str(model.path), test=1), store)
    selection = examples.read("train")
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in selection["prompt_ids"].to_pylist()]
    engine = VllmEngine(model, context=256)
    monkeypatch.setattr(samples, "choose_engine", lambda *_: lambda *_: engine)

    def stage(seed: int) -> int:
        source = {"model": "m", "count": N, "batch_size": batch_size, "engine": "vllm"}
        config = Negatives.model_validate({"seed": seed, "sources": {"autoregressive": source}})
        plan = plan_negatives(config, store, examples, lambda *_, **__: model, NEW_TOKENS)
        generate_negatives(plan, LocalExecutor())
        ids = plan.sources[0].rows.read(selection["example_id"].to_pylist())["token_ids"]
        return sum(map(len, ids.to_pylist()))

    def bare(seed: int, *, together: bool = True) -> int:
        """Samples of a prompt in one request, or in one each, which computes the whole prompt."""
        common = {"top_k": 50, "max_tokens": NEW_TOKENS, "stop_token_ids": [0], "ignore_eos": True, "logprobs": 0,
                  "detokenize": False, "skip_reading_prefix_cache": not together}  # fmt: skip
        seeds = [row_seed(seed, example_id) for example_id in selection["example_id"].to_pylist()]
        found = [(prompt, first, N) for prompt, first in zip(prompts, seeds, strict=True)]
        found.sort(key=lambda request: len(request[0]["prompt_token_ids"]))  # as the stage does
        if not together:
            found = [(prompt, first + k, 1) for prompt, first, _ in found for k in range(N)]
        parameters = [SamplingParams(n=n, seed=first, **common) for _, first, n in found]
        answers = engine._llm.generate([prompt for prompt, _, _ in found], parameters, use_tqdm=False)
        return sum(len(sample.token_ids) for answer in answers for sample in answer.outputs)

    def apart(seed: int) -> int:
        return bare(seed, together=False)

    bare(-1)
    spent: dict[Callable[[int], int], list[tuple[float, float]]] = {stage: [], bare: [], apart: []}
    for seed in range(ROUNDS):
        made = []
        for way in itertools.islice(itertools.cycle(spent), seed, seed + 3):
            engine._llm.reset_prefix_cache()
            wall, cpu = time.perf_counter(), time.process_time()
            made.append(way(seed))
            spent[way].append((time.process_time() - cpu, time.perf_counter() - wall))
        assert len(set(made)) == 1, "the same tokens each way"
    for other, name in ((bare, "bare LLM.generate"), (apart, "one request per sample, prefixes not shared")):
        for clock, what in enumerate(("CPU time", "wall time")):
            ratios = [b[clock] / a[clock] for a, b in zip(spent[stage], spent[other], strict=True)]
            print(f"\nbatch_size {batch_size}: {statistics.median(ratios):.2f}× the rows a second of {name} "
                  f"({what}, {min(ratios):.2f}–{max(ratios):.2f} over {ROUNDS} rounds)", end="")  # fmt: skip
    rate = PROMPTS * N / statistics.median(cpu for cpu, _ in spent[stage])
    print(f"\nbatch_size {batch_size}: {rate:.0f} rows per CPU-second")
