"""Step 0: its loss, and the check that the start is its reference."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.scoring.logprobs import cached_logprobs
from cpo_pipe.trainer.scoring.scorer import Scorer
from tests.support.architectures import table
from tests.support.training import CANDIDATES, Bench, metrics


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_step_0_is_log_k_and_log_k_factorial(tmp_path: Path, new_model: Callable[..., Path], architecture: str) -> None:
    # GPT-2 ships with dropout 0.1, which would change the first loss.
    bench = Bench(tmp_path, new_model(architecture=architecture))
    sizes = [4, 2, 3, 3]
    first = metrics(bench.train("cpo", beta=5.0, max_steps=1))[0]
    assert first["loss"] == pytest.approx(np.mean([math.log(k) for k in sizes]), abs=1e-3)
    assert first["reward_accuracy"] == 0
    assert first["reward_margin"] == pytest.approx(0, abs=1e-2)
    ranked = metrics(bench.train("cpo-ranked", beta=5.0, max_steps=1))[0]
    assert ranked["reward_accuracy"] == 0
    assert ranked["loss"] == pytest.approx(np.mean([math.lgamma(k + 1) for k in sizes]), abs=1e-3)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.003), ("bfloat16", 0.3)])
def test_a_start_that_is_not_its_reference_is_refused(bench: Bench, dtype: str, share: float) -> None:
    # The log-prob of one candidate in eleven is slightly off, as with dropout that was left on.
    prompt, candidates, _ = CANDIDATES["a"]
    probe = table({"probe": (prompt, candidates)})
    true = cached_logprobs(bench.store, bench.model, dtype, probe, LocalExecutor()).read(["probe"]).to_pylist()
    value = {row["candidate_id"]: row["logprob"] for row in true}[candidate_id(prompt, candidates[1])]
    rows = bench.store.rows("reference-logprobs", {"model": bench.model.fingerprint, "dtype": dtype})
    wrong = {"example_id": "a", "candidate_id": candidate_id(prompt, candidates[1]), "num_tokens": 4}
    with rows.writer() as writer:
        writer.add([wrong | {"logprob": value * (1 + share)}])
    with pytest.raises(RunError, match=r"train\.t: step 0: .* their log-probs differ by "):
        bench.train("cpo", dtype=dtype, beta=20.0)
    assert not list(bench.store.root.glob("checkpoints/*/model.safetensors"))


@pytest.mark.parametrize("objective", ["cpo", "cpo-ranked", "dpo", "apo-zero", "apo-down"])
def test_a_wrong_start_is_found_for_every_objective_and_a_small_beta(bench: Bench, objective: str) -> None:
    """APO's sigmoids are odd around 0, where too large and too small log-probs cancel, and a small β hides both."""
    named = {name: (prompt, candidates) for name, (prompt, candidates, _) in CANDIDATES.items()}
    true = cached_logprobs(bench.store, bench.model, "float32", table(named), LocalExecutor()).read(list(named))
    rows = bench.store.rows("reference-logprobs", {"model": bench.model.fingerprint, "dtype": "float32"})
    off = np.random.default_rng(0).normal(scale=1.8, size=true.num_rows)
    wrong = Store(bench.store.root.parent / "wrong")
    with wrong.rows("reference-logprobs", rows.spec).writer() as writer:
        writer.add([row | {"logprob": row["logprob"] + by} for row, by in zip(true.to_pylist(), off, strict=True)])
    bench.store = wrong
    with pytest.raises(RunError, match=r"step 0: .* their log-probs differ by "):
        bench.train(objective, beta=0.1)


LONG = {
    "a": ([5, 6, 7], [[9 + k % 80 for k in range(n)] for n in (110, 90, 70)], [0, 1, 2]),
    "b": ([8], [[4, 4, 0], [6, 0]], [0, 1]),
}
"""Short candidates, and some as long as the context of the tiny model allows."""


def test_rounding_of_long_candidates_is_not_a_wrong_start(tmp_path: Path, tiny_model: Path) -> None:
    # In bfloat16, with another attention backend than the reference, rewards are several nats off 0 at a large β.
    bench = Bench(tmp_path, tiny_model, LONG)
    bench.train("cpo", dtype="bfloat16", attention="padded", beta=1.0, max_steps=1, batch_size=2)
    first = metrics(bench.train("cpo", dtype="bfloat16", attention="cascade", beta=50.0, max_steps=1, batch_size=2))[0]
    assert abs(first["reward_margin"]) > 1.5


def test_dropout_in_bfloat16_is_a_wrong_start_at_a_small_beta(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, tiny_model, LONG)
    bench.train("cpo", dtype="bfloat16", beta=0.01, max_steps=1, batch_size=2)

    class Wrong(Scorer):
        def forward(self, *inputs: Any) -> torch.Tensor:
            if not torch.is_grad_enabled() or self.dtype == "float32":  # what the self-check sees
                return super().forward(*inputs)
            embedding: Any = self.model.get_input_embeddings()  # type: ignore[no-untyped-call]
            drop = lambda module, given, out: torch.nn.functional.dropout(out, 0.1)  # noqa: E731
            with torch.random.fork_rng():
                torch.manual_seed(0)
                hook = embedding.register_forward_hook(drop)
                found = super().forward(*inputs)
                hook.remove()
            return found

    monkeypatch.setattr("cpo_pipe.trainer.loop.Scorer", Wrong)
    with pytest.raises(RunError, match=r"step 0: .* their log-probs differ by "):
        bench.train("cpo", dtype="bfloat16", beta=0.01, max_steps=2, batch_size=2)


def test_step_0_in_bfloat16_is_log_k(bench: Bench) -> None:
    first = metrics(bench.train("cpo", dtype="bfloat16", beta=0.1, max_steps=1))[0]
    assert first["loss"] == pytest.approx(np.mean([math.log(k) for k in (4, 2, 3, 3)]), abs=5e-2)
