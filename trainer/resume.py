"""The resume checkpoint: the state of a training in progress, from which a stopped training continues.

    <root>/checkpoints/.in-progress/<hash>/<step>/        weights, optimizer state and metrics after so many steps
    <root>/checkpoints/.in-progress/<hash>/best-<step>/   the weights with the lowest validation loss so far

The data order is a function of seed and step and nothing else is random, so nothing else is needed to continue.
One process writes for all; where weights are sharded (FSDP) each writes its own shards. Each folder has the checksums
of its files: a training that finds one damaged moves its state aside and starts from the beginning.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.store import Artifact, atomic, checksums
from cpo_pipe.data.store.paths import shown
from cpo_pipe.trainer.distributed import agreed

log = logging.getLogger(__name__)

SAVE_SECONDS = 300.0
"""Time between two saves."""
SAVE_SHARE = 0.05
"""Share of the time that saving may take; where it would take more, saves are further apart."""

Metrics = list[dict[str, float]]


class ResumeCheckpoint:
    """Saves and restores one training; used under the lock of its checkpoint.

    Args:
        artifact: the checkpoint that is being made.
        accelerator: the processes that make it.
        module: the network as it is trained.
        optimizer: AdamW over the trained parameters.
    """

    def __init__(
        self, artifact: Artifact, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
    ):
        self.folder = artifact.in_progress
        self._artifact = artifact
        self._accelerator = accelerator
        self._parameters = {
            name.removeprefix("module."): parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters.values())
        self._optimizer = optimizer
        self._pause = SAVE_SECONDS
        self._saved = time.monotonic()

    def restore(self) -> tuple[Metrics, dict[str, Any]]:
        """Put the last saved state into network and optimizer.

        Returns:
            The metrics of the steps before it, and the facts saved with it; both empty without a saved state, or if it
            is damaged and moved aside.
        """
        step = agreed(self._undamaged_step() if self._accelerator.is_main_process else None)
        if step is None:
            return [], {}
        saved = self.folder / str(step)
        state = self._weights() | self._optimizer_state()
        facts: dict[str, Any] = json.loads((saved / "facts.json").read_text())
        del facts["best"]
        if facts.pop("sharded"):
            load_shards(state, checkpoint_id=saved / "shards")
        else:
            _fill(state, load_file(saved / "state.safetensors"))
        metrics: Metrics = pq.read_table(saved / "metrics.parquet").to_pylist()
        log.info("%s: resumes after step %d, where it was stopped", self._artifact.name, step)
        return metrics, facts

    def _undamaged_step(self) -> int | None:
        """Return the step after which the state was saved; None without a valid one."""
        steps = [int(path.name) for path in self.folder.glob("[0-9]*")]
        if not steps:
            return None
        step = max(steps)
        found = checksums.fault(self.folder / str(step))
        if found is None:
            best = json.loads((self.folder / str(step) / "facts.json").read_text())["best"]
            found = None if best is None else checksums.fault(self.folder / best)
            found = f"its best weights: {found}" if found else None
        if found is None:
            for path in self.folder.glob("best-*"):  # written after the state: nothing vouches for them
                if path.name != best:
                    shutil.rmtree(path)
            return step
        aside = self._artifact.path.with_name(f"{self._artifact.path.name}.damaged-{time.time_ns()}")
        aside.mkdir()
        # The state last: killed in between, the next run finds it without its best weights.
        for path in [*self.folder.glob("best-*"), *self.folder.glob("[0-9]*")]:
            path.rename(aside / path.name)
        log.warning(
            "%s: the state saved after step %d is damaged (%s); moved to %s; the training starts again from the "
            "beginning",
            self._artifact.name, step, found, shown(aside),
        )  # fmt: skip
        return None

    def save_now_and_then(self, metrics: Metrics, facts: dict[str, Any]) -> None:
        """Save the state after a whole step, if the last save is long enough ago."""
        due = time.monotonic() - self._saved >= self._pause
        if _anywhere(self._accelerator, due):
            self.save(metrics, facts)

    def save(self, metrics: Metrics, facts: dict[str, Any]) -> None:
        """Save the state after a whole step, unless it is saved already or has weights that are not finite."""
        start = time.monotonic()
        target = self.folder / str(len(metrics))
        if not metrics or target.exists() or _anywhere(self._accelerator, not self._finite()):
            return
        needed = {target.name}
        best = None
        if any(row.get("validation_loss") is not None for row in metrics):
            best = f"best-{best_step(metrics)}"
            needed.add(best)
            best = best if (self.folder / best).is_dir() else None
        with self._written(target) as scratch:
            if scratch is not None:
                pq.write_table(metrics_table(metrics), scratch / "metrics.parquet")
                (scratch / "facts.json").write_text(json.dumps({**facts, "sharded": self._sharded, "best": best}))
            self._write(self._weights() | self._optimizer_state(), target, scratch)
        for path in self.folder.iterdir() if self._accelerator.is_main_process else ():
            if path.is_dir() and path.name not in needed:  # the groups' file is in the folder, too
                shutil.rmtree(path)
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._saved - start) / SAVE_SHARE)

    def save_best(self, step: int) -> None:
        """Keep the weights after `step` steps: they are the best so far."""
        target = self.folder / f"best-{step}"
        if not target.exists():
            with self._written(target) as scratch:
                self._write(self._weights(), target, scratch)

    def restore_best(self, step: int) -> None:
        """Put the weights kept after `step` steps into the network.

        Raises:
            RunError: they are damaged.
        """
        saved, state = self.folder / f"best-{step}", self._weights()
        found = agreed(checksums.fault(saved) if self._accelerator.is_main_process else None)
        if found is not None:
            raise RunError(
                f"{self._artifact.name}: the best weights, kept after {step} steps, are damaged ({found}); run the "
                "same command again: the training starts again from the beginning"
            )
        if self._sharded:
            load_shards(state, checkpoint_id=saved / "shards")
        else:
            _fill(state, load_file(saved / "state.safetensors"))

    def _finite(self) -> bool:
        """Return whether the trained weights, or this process's part of them, are finite."""
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self._parameters.values())
        return bool(torch.stack([parameter.detach().isfinite().all() for parameter in local]).all())

    def _weights(self) -> dict[str, Tensor]:
        return {f"weights.{name}": parameter.detach() for name, parameter in self._parameters.items()}

    def _optimizer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            fields = self._optimizer.state[parameter]
            if not fields:  # nothing was stepped yet: tensors to load into
                fields |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                           "exp_avg_sq": torch.zeros_like(parameter)}  # fmt: skip
            state |= {f"optimizer.{name}.{field}": value for field, value in fields.items()}
        return state

    def _write(self, state: dict[str, Tensor], target: Path, scratch: Path | None) -> None:
        if self._sharded:
            # All processes write into one folder, which becomes valid when the main one renames it.
            save_shards(state, checkpoint_id=_shared_scratch(target) / "shards")
        elif scratch is not None:
            save_file({name: value.contiguous().cpu() for name, value in state.items()}, scratch / "state.safetensors")

    @contextmanager
    def _written(self, target: Path) -> Iterator[Path | None]:
        """Yield a scratch folder to the main process, None to the others; it becomes `target` once all have written."""
        scratch = _shared_scratch(target)
        main = self._accelerator.is_main_process
        if main:
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed while it wrote
            scratch.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        try:
            yield scratch if main else None
            self._accelerator.wait_for_everyone()
            if main:
                checksums.record(scratch)
                for file in scratch.rglob("*"):
                    atomic.sync(file)
                atomic.rename(scratch, target)
        finally:
            if main:
                shutil.rmtree(scratch, ignore_errors=True)
        self._accelerator.wait_for_everyone()


def metrics_table(metrics: Metrics) -> pa.Table:
    """Return the metrics of all steps, with every column that any of them has."""
    columns = dict.fromkeys(key for row in metrics for key in row)
    return pa.table({key: [row.get(key) for row in metrics] for key in columns})


def best_step(metrics: Metrics) -> int:
    """Return after how many steps the validation loss was lowest; the first of equals."""
    measured = [row for row in metrics if row.get("validation_loss") is not None]
    return int(min(measured, key=lambda row: row["validation_loss"])["step"])


def _shared_scratch(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}")


def _fill(state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(values[name])


def _anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether a flag is set in any process; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(int(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum"))
