"""Trainings of tiny models on groups written out by hand, and naive computations to compare them with."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.model import Model, ScratchModel
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Artifact, Rows, Store
from cpo_pipe.trainer import samples
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.monitors import Watch
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.train import Inputs, train
from cpo_pipe.trainer.validation_split import split_validation
from tests.support.architectures import table

CANDIDATES = {
    "a": ([5, 6, 7], [[9, 10, 0], [11, 12, 13, 14], [3, 0], [20, 21, 0]], [0, 2, 3, 1]),
    "b": ([8], [[4, 4, 0], [6, 0]], [0, 1]),
    "c": ([30, 31, 32, 33], [[40, 0], [41, 42, 0], [43, 44, 45, 46, 47]], [0, 2, 1]),
    "d": ([12, 13], [[15, 16, 17, 18, 19, 0], [21], [22, 23]], [0, 1, 2]),
}


class Bench:
    """A store with the groups of CANDIDATES (or of what replaces some of them), and a tiny model."""

    sample_tokens = 8
    """In place of samples.SAMPLE_TOKENS: sampling for the repetition would take most of a tiny training's time."""

    def __init__(self, root: Path, model: Path, candidates: dict[str, Any] | None = None):
        self.store = Store(root / "store")
        self.candidates = CANDIDATES if candidates is None else candidates
        self.model = locate_model(str(model), self.store)
        self.tokenizer = locate_tokenizer(str(model), self.store)

    def selection(self) -> pa.Table:
        return pa.Table.from_pylist(
            [
                {"example_id": name, "split": "train", "prompt": name, "rendered": name, "target": "t",
                 "prompt_ids": prompt, "target_ids": ids[0], "ends": True, "category": None}
                for name, (prompt, ids, _) in self.candidates.items()
            ],
            schema=EXAMPLES,
        )  # fmt: skip

    def groups(self) -> Rows:
        rows = self.store.rows("groups", {"of": "the test"})
        if not rows.num_rows():
            with rows.writer() as writer:
                writer.add([self._group(name) for name in self.candidates])
        return rows

    def _group(self, name: str) -> dict[str, Any]:
        prompt, candidates, ranks = self.candidates[name]
        return {
            "example_id": name,
            "prompt_ids": prompt,
            "candidates": [
                {"candidate_id": candidate_id(prompt, ids), "text": "t", "token_ids": ids, "strategy": "s",
                 "similarity": 0.5, "rank": rank}
                for ids, rank in zip(candidates, ranks, strict=True)
            ],
        }  # fmt: skip

    def inputs(self, objective: str, init: Model | ScratchModel | None = None) -> Inputs:
        listwise = objective not in ("mle", "pss")
        return Inputs(
            self.tokenizer,
            init or self.model,
            self.selection(),
            self.groups() if listwise else None,
            self.model if listwise and objective != "slic" else None,
        )

    def train(self, objective: str, init: Model | ScratchModel | None = None, **settings: Any) -> Artifact:
        reference = {} if objective in ("mle", "pss", "slic") else {"reference": "m"}
        values = {
            "init": "m",
            "objective": objective,
            "max_steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-3,
            **reference,
            **settings,
        }
        inputs = self.inputs(objective, init)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(samples, "SAMPLE_TOKENS", self.sample_tokens)
            return train("t", OBJECTIVES.parse(values), self.store, inputs, None, LocalExecutor())


def metrics(artifact: Artifact) -> list[dict[str, float]]:
    """One row for each step."""
    rows: list[dict[str, float]] = pq.read_table(artifact.path / METRICS_FILE).to_pylist()
    return [row for row in rows if row["loss"] is not None]


def measured(artifact: Artifact, column: str) -> dict[int, float]:
    """What was measured now and then, by the number of steps before it."""
    rows = pq.read_table(artifact.path / METRICS_FILE, columns=["step", column]).to_pylist()
    return {row["step"]: row[column] for row in rows if row[column] is not None}


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / "model.safetensors")


def validation_ids(bench: Bench, count: int) -> set[str]:
    """Return which groups of a bench are for validation."""
    config = OBJECTIVES.parse({"init": "m", "objective": "cpo", "reference": "m", "validation": count})
    groups = table({name: (prompt, candidates) for name, (prompt, candidates, _) in bench.candidates.items()})
    trained, validation = split_validation("t", config, groups)
    assert sorted([*trained, *validation]) == list(range(groups.num_rows))
    return set(groups["example_id"].take(validation).to_pylist())


def naive_logprob(model: torch.nn.Module, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation)].sum()


def naive_decay(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for AdamW: in Llama and GPT-2, biases and norms are the vectors."""
    whole = list(model.parameters())
    return [{"params": [p for p in whole if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in whole if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings since the last call."""
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return messages


def monitored(objective: str = "cpo", **settings: Any) -> Training:
    reference = {} if objective in ("mle", "pss", "slic") else {"reference": "m"}
    return OBJECTIVES.parse({"init": "m", "objective": objective, **reference, **settings})


def watching(metrics: Sequence[dict[str, Any]] = (), objective: str = "cpo") -> Watch:
    return Watch("t", monitored(objective), metrics)


def look(watch: Watch, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        watch.step(row)
