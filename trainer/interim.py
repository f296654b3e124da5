"""The state of a training in progress, saved now and then, so that a killed training goes on where it was.

    <root>/checkpoints/.in-progress/<address>/<step>/   weights, optimizer state and metrics after so many steps

The data order is a function of seed and step and nothing else is random, so this is all there is to go on from.
"""

import logging
import shutil
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data import atomic
from cpo_pipe.data.store import Product

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SAVE_SECONDS = 300.0
"""Time between two saves."""
SAVE_SHARE = 0.05
"""Share of the time that saving may take; where it would take more, saves are further apart."""

Metrics = list[dict[str, float]]


class Interim:
    """Saves and restores one training; used under the lock of its checkpoint."""

    def __init__(self, product: Product):
        self._folder = product.path.parent / ".in-progress" / product.path.name
        self._pause = SAVE_SECONDS
        self._saved = time.monotonic()

    def restore(self, model: "PreTrainedModel", optimizer: "torch.optim.Optimizer") -> Metrics:
        """Put the last saved state into the model and the optimizer; returns the metrics of the steps behind it."""
        from safetensors.torch import load_file, load_model

        steps = [int(path.name) for path in self._folder.glob("[0-9]*")]
        if not steps:
            return []
        saved = self._folder / str(max(steps))
        load_model(model, saved / "model.safetensors", device=str(model.device))
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in load_file(saved / "optimizer.safetensors").items():
            parameter, _, field = name.partition(".")
            state.setdefault(int(parameter), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        metrics: Metrics = pq.read_table(saved / "metrics.parquet").to_pylist()
        log.info("goes on after step %d, where it was stopped", max(steps))
        return metrics

    def save_now_and_then(self, model: "PreTrainedModel", optimizer: "torch.optim.Optimizer", metrics: Metrics) -> None:
        """Save the state after a whole step, if the last save is long enough ago."""
        if time.monotonic() - self._saved < self._pause:
            return
        start = time.monotonic()
        self._save(model, optimizer, metrics)
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._saved - start) / SAVE_SHARE)

    def clear(self) -> None:
        """Forget the training: it is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _save(self, model: "PreTrainedModel", optimizer: "torch.optim.Optimizer", metrics: Metrics) -> None:
        from safetensors.torch import save_file, save_model

        target = self._folder / str(len(metrics))
        scratch = atomic.temporary(target)
        try:
            scratch.mkdir(parents=True)
            save_model(model, str(scratch / "model.safetensors"))
            state = optimizer.state_dict()["state"]
            tensors = {f"{number}.{field}": t for number, fields in state.items() for field, t in fields.items()}
            save_file(tensors, scratch / "optimizer.safetensors")
            pq.write_table(pa.Table.from_pylist(metrics), scratch / "metrics.parquet")
            for file in scratch.iterdir():
                atomic.sync(file)
            atomic.rename(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for path in self._folder.iterdir():
            if path != target:
                shutil.rmtree(path)
