"""Negatives: what is sampled, and that a row is made once and found by what decides it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Request, Sampling
from cpo_pipe.pipeline.engines.registry import choose_engine
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.generate import Plan, generate_negatives, plan_negatives
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from tests.support.answers import answers
from tests.support.negatives import negatives_section
from tests.support.pairs import pairs, write_jsonl

SAMPLING = Sampling(temperature=1.0, top_k=50, max_new_tokens=6, stop_ids=(0,))


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return TransformersEngine(locate_model(str(tiny_model), Store(tmp_path_factory.mktemp("store"))))


def test_a_sample_depends_on_prompt_and_seed_only(engine: TransformersEngine) -> None:
    requests = [Request([5, 6, 7], 3, 100), Request([9, 10, 11, 12, 13], 2, 7), Request([8], 1, 100)]
    together = answers(engine, requests, SAMPLING)
    backwards = answers(engine, requests[::-1], SAMPLING)[::-1]
    alone = [answers(engine, [request], SAMPLING)[0] for request in requests]
    (third,) = answers(engine, [Request([5, 6, 7], 1, 102)], SAMPLING)[0]
    ids = [[sample.token_ids for sample in samples] for samples in together]
    assert ids == [[sample.token_ids for sample in samples] for samples in backwards]
    assert ids == [[sample.token_ids for sample in samples] for samples in alone]
    assert third.token_ids == ids[0][2], "sample k of a request uses seed + k"
    assert len({tuple(sample) for sample in ids[0]}) > 1


def test_first_tokens_follow_the_models_top_k_distribution(engine: TransformersEngine, tiny_model: Path) -> None:
    draws, k = 4000, 5
    sampling = Sampling(temperature=0.7, top_k=k, max_new_tokens=1, stop_ids=())
    samples = answers(engine, [Request([5, 6, 7], draws, 1 << 20)], sampling)[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    top = logits.topk(k)
    expected = (top.values / 0.7).softmax(-1).double()
    counts = Counter(sample.token_ids[0] for sample in samples)
    assert set(counts) <= set(top.indices.tolist())
    observed = [counts[token] for token in top.indices.tolist()]
    assert chisquare(observed, (expected / expected.sum() * draws).tolist()).pvalue > 1e-3


def test_logprob_is_the_raw_models_and_the_stop_token_stays(engine: TransformersEngine, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    frequent_stops = Sampling(temperature=2.0, top_k=3, max_new_tokens=6, stop_ids=tuple(range(0, 300, 2)))
    samples = answers(engine, [Request([5, 6, 7], 40, 0)], frequent_stops)[0]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        *body, last = sample.token_ids
        assert all(token % 2 for token in body)
        assert (last % 2 == 0) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 6
        with torch.no_grad():
            logits = model(torch.tensor([[5, 6, 7, *sample.token_ids]])).logits[0, 2:-1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None]).sum()
        assert sample.logprob == pytest.approx(expected.item(), rel=1e-5)


def test_greedy_is_that_of_transformers(engine: TransformersEngine, tiny_model: Path) -> None:
    greedy = Sampling(temperature=0, top_k=0, max_new_tokens=8, stop_ids=(0,))
    ours = answers(engine, [Request([5, 6, 7], 1, 0), Request([9], 1, 0)], greedy)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for prompt, (sample,) in zip([[5, 6, 7], [9]], ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=0)
        assert sample.token_ids == theirs[0, len(prompt) :].tolist()


def test_a_models_own_generation_settings_do_not_leak_in(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 50.0, "max_length": 2, "eos_token_id": 0}')
    store = Store(tmp_path / "store")
    plain, configured = (TransformersEngine(locate_model(str(path), store)) for path in (tiny_model, folder))
    request = [Request([5, 6, 7], 4, 0)]
    assert answers(plain, request, SAMPLING) == answers(configured, request, SAMPLING)


class Workplace:
    """A store, a source file and a model, and how many negatives a call made."""

    def __init__(self, root: Path, model: Path):
        self.root, self.store = root, Store(root / "store")
        self.model = root / "model"
        shutil.copytree(model, self.model)

    def generate(self, rows: list[dict[str, str]], n: int, **settings: object) -> tuple[int, Plan]:
        data = Pairs(source=str(write_jsonl(self.root / "rows.jsonl", rows)), tokenizer=str(self.model), test=1)
        examples = prepare(data, self.store)
        settings = {"model": "m", "max_new_tokens": 5, "engine": "transformers", **settings}
        config = Negatives.model_validate(negatives_section({"autoregressive": n}, **settings))
        before = self.count()
        plan = plan_negatives(config, self.store, examples, lambda _: locate_model(str(self.model), self.store), 5)
        generate_negatives(plan, LocalExecutor())
        assert plan.missing() == 0
        return self.count() - before, plan

    def count(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.store.root.glob("negatives/*/shards/*.parquet"))


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path) -> Workplace:
    return Workplace(tmp_path, tiny_model)


def test_only_what_is_missing_is_made(workplace: Workplace) -> None:
    assert workplace.generate(pairs(21), n=5)[0] == 20 * 5
    assert workplace.generate(pairs(21), n=5)[0] == 0
    assert workplace.generate(pairs(21), n=3)[0] == 0, "fewer are there already"
    assert workplace.generate(pairs(21), n=11)[0] == 20 * 6, "six more each, not eleven"
    made, sources = workplace.generate(pairs(31), n=11)
    assert made == 10 * 11, "ten new rows, ten new groups of negatives"
    assert sources.selection.num_rows == 30
    made, sources = workplace.generate(pairs(11), n=11)
    assert made == 0
    assert sources.selection.num_rows == 10, "rows that were removed are not read"


def test_the_text_of_a_sample_is_without_what_ends_it(workplace: Workplace) -> None:
    ends = [*range(0, 300, 2)]  # ordinary tokens, which decoding would keep
    (workplace.model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    _, sources = workplace.generate(pairs(9), n=4)
    tokenizer = AutoTokenizer.from_pretrained(workplace.model)
    rows = sources.sources[0].rows.read(sources.selection["example_id"]).to_pylist()
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    assert len(ended) > 9
    for row in ended:
        assert row["token_ids"][-1] in ends
        assert row["text"] == tokenizer.decode(row["token_ids"][:-1])


def test_samples_made_in_two_steps_are_those_made_at_once(tmp_path: Path, tiny_model: Path) -> None:
    def tokens(sources: Plan) -> list[list[int]]:
        ids = sources.selection["example_id"].to_pylist()
        tokens: list[list[int]] = sources.sources[0].rows.read(ids)["token_ids"].to_pylist()
        return tokens

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    steps, once = Workplace(tmp_path / "a", tiny_model), Workplace(tmp_path / "b", tiny_model)
    steps.generate(pairs(7), n=2)
    assert tokens(steps.generate(pairs(7), n=5)[1]) == tokens(once.generate(pairs(7), n=5)[1])


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.5}, {"top_k": 3}, {"max_new_tokens": 4}, {"seed": 1}], ids=lambda s: next(iter(s))
)
def test_what_decides_the_values_makes_new_rows(workplace: Workplace, settings: dict[str, object]) -> None:
    workplace.generate(pairs(4), n=2)
    assert workplace.generate(pairs(4), n=2, **settings)[0] == 6


def test_what_does_not_decide_them_makes_none(workplace: Workplace) -> None:
    workplace.generate(pairs(4), n=2)
    assert workplace.generate(pairs(4), n=2, batch_size=1)[0] == 0
    assert workplace.generate(pairs(4), n=2, dtype="bfloat16")[0] == 0, "provenance, not identity"
    moved = workplace.root / "renamed"
    workplace.model.rename(moved)
    workplace.model = moved
    assert workplace.generate(pairs(4), n=2)[0] == 0, "the same weights under another name"


def test_other_weights_under_the_same_name_make_all(workplace: Workplace, new_model: Callable[..., Path]) -> None:
    workplace.generate(pairs(4), n=2)
    shutil.copy(new_model(seed=1) / "model.safetensors", workplace.model / "model.safetensors")
    assert workplace.generate(pairs(4), n=2)[0] == 6


def test_a_prompt_that_leaves_no_room_is_refused(workplace: Workplace) -> None:
    with pytest.raises(InputError, match=r"max_new_tokens is 127 .* context of .* is 128 tokens; lower"):
        workplace.generate(pairs(4), n=1, max_new_tokens=127)
    assert workplace.count() == 0


def test_auto_says_what_it_took(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    choose_engine("auto", locate_model(str(workplace.model), workplace.store))
    assert "engine: " in caplog.text
