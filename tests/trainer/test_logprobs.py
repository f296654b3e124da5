"""Log-probs against a naive loop, one sequence at a time without padding, gradients included."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.groups import Group, read_reference
from cpo_pipe.trainer.logprobs import cached_logprobs


def naive(model: torch.nn.Module, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    total = torch.zeros(())
    for at, token in enumerate(continuation):
        logits = model(torch.tensor([prompt + continuation[:at]])).logits[0, -1].float()
        total = total + logits.log_softmax(-1)[token]
    return total


def test_cached_by_content_and_a_missing_one_is_an_error(tmp_path: Path, tiny_model: Path) -> None:
    store = Store(tmp_path)
    model = locate_model(str(tiny_model), store)
    pairs = [("a", [5, 6], [[7, 0], [8, 9]]), ("b", [5], [[7, 0]])]
    rows = cached_logprobs(store, model, "float32", pairs)
    assert rows.num_rows() == 3
    shards = rows.files()
    cached_logprobs(store, model, "float32", pairs[:1])
    assert rows.files() == shards
    cached_logprobs(store, model, "float32", [("b", [5], [[7, 0], [4]])])
    assert rows.num_rows() == 4
    group = Group("a", [5, 6], [candidate_id([5, 6], ids) for ids in ([7, 0], [8, 9])], [[7, 0], [8, 9]], None)
    network = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    values = read_reference(rows, [group])
    assert values["a", group.candidate_ids[0]] == (pytest.approx(float(naive(network, [5, 6], [7, 0])), rel=1e-5), 2)
    stranger = Group("a", [5, 6], ["nowhere"], [[1]], None)
    with pytest.raises(RunError, match="no log-prob of candidate nowhere of example a"):
        read_reference(rows, [stranger])


def test_dtype_is_identity(tmp_path: Path, tiny_model: Path) -> None:
    store = Store(tmp_path)
    model = locate_model(str(tiny_model), store)
    pairs = [("a", [5, 6], [[7, 0]])]
    exact, rough = (cached_logprobs(store, model, dtype, pairs) for dtype in ("float32", "bfloat16"))
    assert exact.path != rough.path
    (one,), (other,) = (rows.read(["a"])["logprob"].to_pylist() for rows in (exact, rough))
    assert one != other
    assert other == pytest.approx(one, rel=5e-2)
