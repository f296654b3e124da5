"""Log-probs against a naive loop, one sequence at a time without padding; what is reused; where they are computed."""

import math
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.execution.base import LocalExecutor, Work
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.scoring.logprobs import cached_logprobs, read_logprobs, target_logprobs
from tests.support.architectures import group, table


class Remembers(LocalExecutor):
    """Does the work as another process would: with what a pickle keeps of it. Remembers the items."""

    def __init__(self) -> None:
        self.items: list[dict[str, object]] = []
        self.batches = 0

    def run(self, work: Work, batches: Iterable[pa.Table], label: str, total: int) -> None:
        batches = list(batches)
        self.batches += len(batches)
        self.items += [item for batch in batches for item in batch.to_pylist()]
        assert total == sum(batch.num_rows for batch in batches)
        super().run(pickle.loads(pickle.dumps(work)), batches, label, total)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Model:
    return locate_model(str(tiny_model), Store(tmp_path))


def naive(model: torch.nn.Module, prompt: list[int], continuation: list[int]) -> float:
    total = 0.0
    with torch.no_grad():
        for at, token in enumerate(continuation):
            logits = model(torch.tensor([prompt + continuation[:at]])).logits[0, -1].float()
            total += float(logits.log_softmax(-1)[token])
    return total


def test_cached_by_content_and_a_missing_one_is_an_error(tmp_path: Path, model: Model) -> None:
    store, executor = Store(tmp_path), Remembers()
    groups = table({"a": ([5, 6], [[7, 0], [8, 9]]), "b": ([5], [[7, 0]])})
    rows = cached_logprobs(store, model, "float32", groups, executor)
    assert rows.num_rows() == 3
    shards, made = rows.files(), list(executor.items)
    cached_logprobs(store, model, "float32", groups.slice(0, 1), executor)
    assert rows.files() == shards
    assert executor.items == made
    more = table({"a": groups_of("a", groups), "b": ([5], [[7, 0], [4]]), "c": ([1], [[2]])})
    cached_logprobs(store, model, "float32", more, executor)
    assert rows.num_rows() == 5
    asked = [(item["example_id"], [one["token_ids"] for one in item["candidates"]]) for item in executor.items[2:]]  # type: ignore[attr-defined]
    assert asked == [("b", [[4]]), ("c", [[2]])], "only what is missing"
    network = AutoModelForCausalLM.from_pretrained(model.path)
    pairs = [([5, 6], [7, 0]), ([5, 6], [8, 9]), ([5], [7, 0]), ([5], [4]), ([1], [2])]
    expected = [naive(network, prompt, ids) for prompt, ids in pairs]
    assert read_logprobs(rows, more).tolist() == pytest.approx(expected, rel=1e-5)
    assert rows.read(["b"])["num_tokens"].to_pylist() == [
        len(ids) for _, ids in sorted((candidate_id([5], ids), ids) for ids in ([7, 0], [4]))
    ]
    stranger = table({"a": ([5, 6], [[7, 0], [1]])})
    with pytest.raises(RunError, match=f"no log-prob of candidate {candidate_id([5, 6], [1])} of example a"):
        read_logprobs(rows, stranger)


def groups_of(name: str, groups: pa.Table) -> tuple[list[int], list[list[int]]]:
    (found,) = (group for group in groups.to_pylist() if group["example_id"] == name)
    return found["prompt_ids"], [candidate["token_ids"] for candidate in found["candidates"]]


def test_however_the_groups_are_cut_the_log_probs_are_in_their_places(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With doubles within a group, and with the same prompt and candidates in two.
    texts = [group(3 + number % 7, 3 + number % 4, 5 + number % 3, seed=number % 9) for number in range(30)]
    texts = [(prompt, [*candidates[: number % 7], candidates[0]]) for number, (prompt, candidates) in enumerate(texts)]
    network = AutoModelForCausalLM.from_pretrained(model.path)
    expected = [naive(network, prompt, ids) for prompt, candidates in texts for ids in candidates]
    groups = table(texts)
    shuffled = pa.concat_tables([groups.slice(20), groups.slice(0, 7), groups.slice(7, 13)])
    for number, (window, looked_up) in enumerate([(512, 4096), (4, 3), (1, 30)]):
        monkeypatch.setattr("cpo_pipe.trainer.scoring.logprobs.WINDOW", window)
        monkeypatch.setattr("cpo_pipe.trainer.scoring.logprobs.LOOKED_UP", looked_up)
        store, executor = Store(tmp_path / str(number)), Remembers()
        cached_logprobs(store, model, "float32", shuffled.slice(0, 10), executor)
        rows = cached_logprobs(store, model, "float32", shuffled, executor, "padded", 64)
        assert len(executor.items) == 30
        assert executor.batches >= 30 / window
        assert read_logprobs(rows, groups).tolist() == pytest.approx(expected, rel=1e-5)
        recorded = rows.num_rows()
        assert recorded < len(expected), "doubles are there once"
        cached_logprobs(store, model, "float32", groups, executor)
        assert rows.num_rows() == recorded


def test_one_that_is_not_finite_is_not_one_that_is_missing(tmp_path: Path, model: Model) -> None:
    rows = Store(tmp_path).rows("reference-logprobs", {"of": "the test"})
    groups = table({"a": ([5], [[6], [7]])})
    keys = [candidate["candidate_id"] for candidate in groups.to_pylist()[0]["candidates"]]
    with rows.writer() as writer:
        writer.add([{"example_id": "a", "candidate_id": key, "logprob": value, "num_tokens": 1}
                    for key, value in zip(keys, (math.nan, -1.0), strict=True)])  # fmt: skip
    np.testing.assert_array_equal(read_logprobs(rows, groups), [math.nan, -1.0])


def test_targets_by_example(tmp_path: Path, model: Model) -> None:
    pairs = [([5, 6], [7, 0]), ([8], [9, 10, 11]), ([5, 6], [7, 0])]
    examples = pa.Table.from_pylist(
        [{"example_id": str(number), "split": "test", "prompt": "p", "rendered": "p", "target": "t",
          "prompt_ids": prompt, "target_ids": target, "ends": True, "category": None}
         for number, (prompt, target) in enumerate(pairs)], schema=EXAMPLES,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(model.path)
    found = target_logprobs(Store(tmp_path), model, examples, Remembers())
    assert [tokens for _, tokens in found] == [2, 3, 2]
    expected = [naive(network, prompt, target) for prompt, target in pairs]
    assert [value for value, _ in found] == pytest.approx(expected, rel=1e-5)
    assert target_logprobs(Store(tmp_path), model, examples.slice(0, 0), LocalExecutor()) == []


def test_dtype_is_identity(tmp_path: Path, model: Model) -> None:
    groups, store = table({"a": ([5, 6], [[7, 0]])}), Store(tmp_path)
    exact, rough = (cached_logprobs(store, model, dtype, groups, LocalExecutor()) for dtype in ("float32", "bfloat16"))
    assert exact.path != rough.path
    (one,), (other,) = (read_logprobs(rows, groups) for rows in (exact, rough))
    assert one != other
    assert other == pytest.approx(one, rel=5e-2)
