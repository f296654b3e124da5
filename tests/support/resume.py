"""Trainings that are stopped, and what they leave to resume from."""

import math
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.optimizer import lr_factor
from tests.support.training import Bench


def saved(store: Path) -> list[str]:
    """The states of trainings in progress."""
    return sorted(path.name for path in store.glob("checkpoints/.in-progress/*/*") if path.is_dir())


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Weights and metrics, to the last bit."""
    left, right = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)
    tables = [pq.read_table(folder / METRICS_FILE).drop(["seconds"]) for folder in (ours, theirs)]
    assert tables[0].equals(tables[1])


def save_often(patch: pytest.MonkeyPatch) -> None:
    """Save after every step."""
    patch.setattr("cpo_pipe.trainer.resume.SAVE_SECONDS", 0.0)
    patch.setattr("cpo_pipe.trainer.resume.SAVE_SHARE", math.inf)


def in_progress_of(bench: Bench) -> list[str]:
    """The whole states of trainings in progress."""
    return [name for name in saved(bench.store.root) if not name.startswith("best")]


def interrupted_at(step: int) -> Callable[[Training, int], float]:
    """`lr_factor` with a real signal before a step."""

    def factor(config: Training, at: int) -> float:
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return lr_factor(config, at)

    return factor
