"""The strategies that need no sampler: where tokens come from, how they are distributed, what each row depends on."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import row_seed
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.negatives.batch import Draw
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.generate import Plan, generate_negatives, plan_negatives
from cpo_pipe.pipeline.negatives.meanfield import redraw
from cpo_pipe.pipeline.negatives.truncation import cuts
from cpo_pipe.pipeline.prepare.pairs import Pairs
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.samples import SAMPLE_INDICES
from cpo_pipe.trainer.scoring.head import Head
from cpo_pipe.trainer.scoring.scorer import Scorer
from tests.support.marks import slow_except
from tests.support.negatives import negatives_section
from tests.support.pairs import pairs, write_jsonl


class Bench:
    """A store, a model and what a recipe's negatives are made of."""

    def __init__(self, root: Path, model: Path):
        root.mkdir(exist_ok=True)
        self.root, self.model, self.store = root, model, Store(root / "store")

    def negatives(self, counts: dict[str, int], rows: list[dict[str, str]] | None = None, **settings: Any) -> Plan:
        source = str(write_jsonl(self.root / "rows.jsonl", pairs(21) if rows is None else rows))
        self.examples = prepare(Pairs(source=source, tokenizer=str(self.model), test=1), self.store)
        settings = {"model": "m", "engine": "transformers", **settings}
        config = Negatives.model_validate(negatives_section(counts, **settings))
        plan = plan_negatives(config, self.store, self.examples, lambda _: locate_model(str(self.model), self.store), 5)
        generate_negatives(plan, LocalExecutor())
        return plan

    def rows(self, counts: dict[str, int], **arguments: Any) -> dict[str, list[dict[str, Any]]]:
        """Negatives by example id, of one strategy."""
        sources = self.negatives(counts, **arguments)
        (pool,) = sources.sources
        found: dict[str, list[dict[str, Any]]] = {}
        for row in pool.rows.read(sources.selection["example_id"].to_pylist()).to_pylist():
            found.setdefault(row["example_id"], []).append(row)
        return found

    def targets(self) -> dict[str, dict[str, Any]]:
        return {row["example_id"]: row for row in self.examples.read("train").to_pylist()}


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


STRATEGIES = ["batch", "meanfield", "truncation"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_depends_on_its_key_alone(bench: Bench, tmp_path: Path, strategy: str) -> None:
    first = bench.rows({strategy: 2})
    grown = bench.rows({strategy: 4})
    assert all(grown[key][:2] == rows for key, rows in first.items()), "more of them only adds to fewer"
    at_once = Bench(tmp_path / "other", bench.model).rows({strategy: 4}, rows=pairs(21)[::-1])
    assert at_once == grown, "neither order nor batching nor what was there before matters"
    assert bench.rows({strategy: 4}, seed=1) != grown
    assert all(row["strategy"] == strategy for rows in grown.values() for row in rows)
    made = {row["generator"] for rows in grown.values() for row in rows}
    assert made == ({locate_model(str(bench.model), bench.store).fingerprint} if strategy == "meanfield" else {None})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_there_is_not_made_again(bench: Bench, strategy: str) -> None:
    def shards() -> list[Path]:
        return sorted(bench.store.root.glob("negatives/*/shards/*"))

    bench.negatives({strategy: 3})
    before = shards()
    bench.negatives({strategy: 2})
    assert shards() == before
    bench.negatives({strategy: 3}, rows=pairs(31))
    new = set(shards()) - set(before)
    assert len({path.parent for path in [*new, *before]}) == (2 if strategy == "batch" else 1), "a pool is all its rows"


def test_a_mixture_is_made_of_its_parts(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    sources = bench.negatives({"batch": 3, "meanfield": 5, "truncation": 3})
    assert [(pool.label, pool.count) for pool in sources.sources] == [
        ("batch", 3),
        ("meanfield", 5),
        ("truncation", 3),
    ]
    assert sources.missing() == 0
    assert "negatives: 100 meanfield in negatives/" in caplog.text
    assert bench.negatives({"autoregressive": 1, "truncation": 1}, max_new_tokens=3).missing() == 0


# ── truncation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cut_is_a_beginning_of_the_target_with_an_end(bench: Bench) -> None:
    for key, rows in bench.rows({"truncation": 3}).items():
        target = bench.targets()[key]
        kept = [row["token_ids"][:-1] for row in rows]
        assert all(row["token_ids"][-1] == 0 and row["finish_reason"] == "stop" for row in rows)
        assert all(ids == target["target_ids"][: len(ids)] for ids in kept)
        assert all(0 < len(ids) < len(target["target_ids"]) - 1 for ids in kept)
        assert all(target["target"].startswith(row["text"]) for row in rows)


def test_places_of_cuts_are_uniform_and_each_comes_once_before_any_comes_again() -> None:
    for tokens, n in ((2, 1), (9, 8), (9, 20), (1, 3)):
        places = cuts("an example", tokens, n, seed=0)
        whole = max(tokens - 1, 1)
        assert all(set(places[start : start + whole]) <= set(range(tokens)) for start in range(0, n, whole))
        assert all(len(set(places[start : start + whole])) == min(whole, n - start) for start in range(0, n, whole))
    assert cuts("an example", 1, 2, seed=0) == [0, 0], "of a single token nothing is left but the end"
    for sample in (0, 2):
        seen = Counter(cuts(f"example {number}", 9, 3, seed=0)[sample] for number in range(4000))
        assert set(seen) == set(range(1, 9))
        assert chisquare([seen[place] for place in range(1, 9)]).pvalue > 1e-4


# ── batch ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_never_the_own_target_nor_that_of_an_equal_prompt(bench: Bench) -> None:
    rows = pairs(12)
    rows += [{"prompt": rows[0]["prompt"], "target": f"another answer {number}"} for number in range(3)]
    rows += [{"prompt": f"ask {number}", "target": rows[1]["target"]} for number in range(3)]
    found = bench.rows({"batch": 5}, rows=rows)
    targets = bench.targets()
    by_prompt: dict[str, set[str]] = {}
    for row in targets.values():
        by_prompt.setdefault(row["rendered"], set()).add(row["target"])
    everything = {row["target"] for row in targets.values()}
    for key, negatives in found.items():
        texts = [row["text"] for row in negatives]
        assert len(set(texts)) == 5
        assert set(texts) <= everything - by_prompt[targets[key]["rendered"]]
        assert all(row["token_ids"][-1] == 0 for row in negatives)


def test_draws_are_uniform_over_the_others() -> None:
    ids = [f"id {number}" for number in range(400)]
    seen: Counter[int] = Counter()
    draw = Draw(ids, ids, [f"t{number % 100}" for number in range(400)], seed=0)
    for row in range(400):
        others = draw.others(row, 8)
        assert len({number % 100 for number in [row, *others]}) == 9
        seen.update(number // 100 for number in others)
    assert chisquare([seen[quarter] for quarter in range(4)]).pvalue > 1e-4


def test_too_small_a_pool_is_refused(bench: Bench) -> None:
    with pytest.raises(
        InputError, match=r"negatives\.sources\.batch\.count is 3, but for example .* there are only 2 other targets"
    ):
        bench.negatives({"batch": 3}, rows=pairs(4))


# ── mean-field ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_share_of_the_tokens_is_drawn_again(bench: Bench) -> None:
    for share in (0.15, 0.5):
        for key, rows in bench.rows({"meanfield": 4}, corruption_rate=share).items():
            target = bench.targets()[key]["target_ids"]
            for row in rows:
                assert len(row["token_ids"]) == len(target)
                changed = sum(a != b for a, b in zip(row["token_ids"], target, strict=True))
                assert changed <= max(1, round(share * (len(target) - 1)))
                assert row["token_ids"][-1] == 0
                assert 0 not in row["token_ids"][:-1], "an end token inside would end the text"


@pytest.mark.parametrize("architecture", slow_except(["llama", "gpt2"], "gpt2"))
def test_draws_follow_the_models_own_distribution(new_model: Callable[..., Path], architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(new_model(architecture=architecture, initializer_range=0.08)).eval()
    prompt, target = [5, 6, 7], [20, 30, 40, 50]
    # A shorter row beside it, so that there is padding.
    scorer = Scorer(model)
    _, logits = scorer.logits(scorer.pack([([9], [[8]]), (prompt, [target])]))
    with torch.no_grad():
        expected = model(torch.tensor([prompt + target])).logits[0, 2:6]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    place = 2
    chances = expected[place].double()
    chances[0] = -torch.inf
    chances = chances.softmax(-1).numpy()
    drawn: Counter[int] = Counter()
    places: Counter[int] = Counter()
    for seed in range(12_000):
        sample = redraw(target, logits, 0.25, [0], seed)
        assert sum(a != b for a, b in zip(sample, target, strict=True)) <= 1
        places.update(at for at in range(4) if sample[at] != target[at])
        if sample[place] != target[place]:
            drawn[sample[place]] += 1
    # Given that the place was drawn and changed: the likeliest tokens one by one, the rest together.
    chances[target[place]] = 0
    chances /= chances.sum()
    top = np.argsort(-chances)[:30]
    total = sum(drawn.values())
    observed = [drawn[int(token)] for token in top]
    assert (
        chisquare(
            [*observed, total - sum(observed)], [*(chances[top] * total), (1 - chances[top].sum()) * total]
        ).pvalue
        > 1e-4
    )
    assert min(places.values()) > 0.8 * max(places.values()), "each place as often as the others, but for no change"


@pytest.mark.parametrize("refused", [False, True])
def test_draws_do_not_depend_on_the_forward_passes_or_the_backend(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: bool
) -> None:
    caplog.set_level("INFO")
    together = bench.rows({"meanfield": 3}, corruption_rate=0.5)
    assert "attention backend padded" in caplog.text
    if refused:
        monkeypatch.setattr(Head, "of", lambda _: Head(2.0, None))  # `padded` computes other log-probs than the model
    else:
        monkeypatch.setattr("cpo_pipe.pipeline.negatives.meanfield.LOGITS", 1)  # one example at a time
    caplog.clear()
    other = Bench(tmp_path / "other", bench.model).rows({"meanfield": 3}, corruption_rate=0.5)
    assert f"attention backend {'plain' if refused else 'padded'}" in caplog.text
    assert other == together


def test_two_samples_of_one_forward_pass_have_draws_of_their_own(bench: Bench) -> None:
    rows = bench.rows({"meanfield": 6}, corruption_rate=1.0)
    assert all(len({tuple(row["token_ids"]) for row in samples}) == 6 for samples in rows.values())
    assert all(row["seed"] == row_seed(0, key) + row["sample_index"] for key, found in rows.items() for row in found)


def test_a_target_that_is_its_end_token_alone_is_left_as_it_is(bench: Bench) -> None:
    (job,) = bench.negatives({"meanfield": 1}).jobs
    first, second = bench.examples.read("train").to_pylist()[:2]
    first["target_ids"] = first["target_ids"][-1:]
    make = job.work.open()
    for batch in ([first], [first, second]):
        (made,) = make(pa.Table.from_pylist([{**example, SAMPLE_INDICES: [0, 1]} for example in batch]))
        assert [(row["text"], row["token_ids"]) for row in made.rows[0][:2]] == [("", [0])] * 2
    assert all(len(row["token_ids"]) == len(second["target_ids"]) for row in made.rows[0][2:])


def test_a_context_too_short_for_a_target_is_refused(bench: Bench, new_model: Callable[..., Path]) -> None:
    bench.model = new_model(max_position_embeddings=8)
    with pytest.raises(
        InputError, match=r"negatives\.sources\.meanfield\.model: the longest prompt and target .* context of .* is 8 "
    ):
        bench.negatives({"meanfield": 1})


# ── the recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_needs_a_model_must_name_one_and_there_must_be_a_source() -> None:
    Negatives.model_validate({"sources": {"batch": {"count": 3}, "truncation": {"count": 2}}})
    for name in ("autoregressive", "meanfield", "prompted"):
        with pytest.raises(ValueError, match=rf"sources.{name}.model\n  Field required"):
            Negatives.model_validate({"sources": {name: {}}})
    with pytest.raises(ValueError, match="no source; add one"):
        Negatives.model_validate({"sources": {}})
    for name in ("target", "all"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be the name of a source"):
            Negatives.model_validate({"sources": {name: {"strategy": "batch"}}})
