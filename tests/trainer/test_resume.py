"""The resume checkpoint of a training: crashes while it is saved, failed saves, damage."""

import errno
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.store import Store, atomic
from cpo_pipe.trainer.accelerator import new_accelerator
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.optimizer import lr_factor
from cpo_pipe.trainer.resume import ResumeCheckpoint
from tests.support.marks import slow_except
from tests.support.resume import assert_same_training, in_progress_of, interrupted_at, save_often
from tests.support.training import Bench, metrics, weights


class Crash(BaseException):
    """The process dies here."""


class Faults:
    """Lets the n-th of the operations that touch the disk fail; with `dies`, nothing happens after it."""

    def __init__(self, patch: pytest.MonkeyPatch, nth: int | None = None, when: str = "before", dies: bool = False):
        self.nth, self.when, self.dies, self.count, self.crashed = nth, when, dies, 0, False
        for owner, name in ((atomic, "sync"), (os, "replace"), (shutil, "rmtree"), (Path, "mkdir"),
                            (Path, "write_text"), (pq, "write_table")):  # fmt: skip
            patch.setattr(owner, name, self._wrapped(getattr(owner, name)))
        real_save = self._wrapped(sys.modules[ResumeCheckpoint.__module__].save_file, torn=True)
        patch.setattr("cpo_pipe.trainer.resume.save_file", real_save)

    def _wrapped(self, real: Callable[..., Any], torn: bool = False) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if self.crashed:  # what tidies up after an error; a dead process does not
                return None if self.dies else real(*arguments, **options)
            self.count += 1
            if self.count != self.nth:
                return real(*arguments, **options)
            self.crashed = True
            if self.when == "after":
                real(*arguments, **options)
                if torn:
                    os.truncate(arguments[1], 100)
            raise Crash

        return operation


class Small:
    """A linear layer trained by a loop of its own, with the resume checkpoint of a training."""

    def __init__(self, root: Path):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.artifact = Store(root).artifact("checkpoints", {"of": "the test"})
        config = OBJECTIVES.parse({"init": "m", "objective": "mle"})
        self.saved = ResumeCheckpoint(self.artifact, new_accelerator("t", config, None), self.module, self.optimizer)
        self.rows, self.facts = self.saved.restore()

    def step(self) -> None:
        # Measured after one step, which is the best, until three are.
        measured: Any = {1: 1.0, 3: 0.5}.get(len(self.rows))
        if measured is not None:
            self.saved.save_best(len(self.rows))
        self.optimizer.zero_grad()
        loss = self.module(torch.arange(3.0) * len(self.rows)).square().sum()
        loss.backward()
        self.optimizer.step()
        self.rows.append({"step": len(self.rows), "loss": float(loss.detach()), "validation_loss": measured})

    def save(self) -> None:
        self.saved.save(self.rows, {"note": "kept"})

    def state(self) -> list[torch.Tensor]:
        moments = [value for fields in self.optimizer.state.values() for value in fields.values()]
        return [tensor.detach().clone() for tensor in (*self.module.parameters(), *moments)]


def up_to_the_save(root: Path) -> Small:
    """Two steps that are saved, the first of them the best so far, and a third that is not."""
    small = Small(root)
    small.step()
    small.step()
    small.save()
    small.step()
    return small


def save_the_fourth(small: Small) -> None:
    small.step()
    small.save()


def operations_of_a_save(root: Path) -> int:
    small = up_to_the_save(root)
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        save_the_fourth(small)
    return faults.count


@pytest.mark.parametrize("dies", slow_except([False, True], True))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_operation_of_a_save_leaves_the_old_state_or_the_new(
    tmp_path: Path, when: str, dies: bool
) -> None:
    operations = operations_of_a_save(tmp_path / "count")
    assert operations > 20, "folders, three files, their flushes and renames, and what is removed"
    calm = up_to_the_save(tmp_path / "calm")
    third = [parameter.detach().clone() for parameter in calm.module.parameters()]
    calm.step()
    calm.step()
    found = set()
    for nth in range(1, operations + 1):
        small = up_to_the_save(tmp_path / str(nth))
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, nth, when, dies)
            with pytest.raises(Crash):
                save_the_fourth(small)
        again = Small(tmp_path / str(nth))
        found.add(len(again.rows))
        assert again.facts["note"] == "kept"
        best_so_far = 3 if len(again.rows) == 4 else 1
        assert (again.artifact.in_progress / f"best-{best_so_far}").is_dir()
        while len(again.rows) < 5:
            again.step()
        again.save()
        assert again.rows == calm.rows
        assert all(map(torch.equal, again.state(), calm.state()))
        # Over what the crash left behind, later saves work; and nothing else stays.
        assert sorted(path.name for path in again.artifact.in_progress.iterdir()) == ["5", "best-3"]
        again.saved.restore_best(3)
        assert all(map(torch.equal, again.module.parameters(), third))
    assert found == {2, 4}


def test_best_weights_saved_after_the_state_are_saved_again(tmp_path: Path) -> None:
    small = up_to_the_save(tmp_path)
    small.step()  # saves the third step's weights as the best; the state that is resumed is the second's
    flip(small.saved.folder / "best-3" / "state.safetensors")
    again = Small(tmp_path)
    again.step()
    third = [parameter.detach().clone() for parameter in again.module.parameters()]
    again.step()
    again.saved.restore_best(3)
    assert all(map(torch.equal, again.module.parameters(), third))


@pytest.mark.slow
def test_a_training_whose_save_failed_goes_on_bit_for_bit(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_often(monkeypatch)
    settings: dict[str, Any] = {"max_steps": 5, "batch_size": 2, "validation": 1, "eval_steps": 2, "keep": "best"}
    calm = Bench(tmp_path / "calm", tiny_model).train("cpo-ranked", **settings)
    rough = Bench(tmp_path / "rough", tiny_model)
    for file in ("state.safetensors", "metrics.parquet", "facts.json"):

        def full(path: Path, file: str = file, real: Callable[[Path], None] = atomic.sync) -> None:
            if path.name == file and path.parent.name == ".tmp-3":
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "sync", full)
            with pytest.raises(OSError, match="No space left"):
                rough.train("cpo-ranked", **settings)
        assert in_progress_of(rough) == ["2"]
    assert_same_training(rough.train("cpo-ranked", **settings).path, calm.path)


KEPT_BEST: dict[str, Any] = {"max_steps": 9, "batch_size": 2, "validation": 2, "eval_steps": 1, "learning_rate": 0.003,
                             "beta": 0.1, "keep": "best"}  # fmt: skip


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def stopped(bench: Bench, patch: pytest.MonkeyPatch, step: int) -> Path:
    """Stop the training of KEPT_BEST before a step; returns where its state is."""
    with patch.context() as inner:
        inner.setattr("cpo_pipe.trainer.loop.lr_factor", interrupted_at(step))
        with pytest.raises(KeyboardInterrupt):
            bench.train("cpo", **KEPT_BEST)
    (state,) = bench.store.root.glob(f"checkpoints/.in-progress/*/{step}")
    return state


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", flip),
        pytest.param("metrics.parquet", cut, marks=pytest.mark.slow),
        pytest.param("facts.json", Path.unlink, marks=pytest.mark.slow),
        pytest.param("best/state.safetensors", flip, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_state_is_moved_aside_and_the_training_starts_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    calm: Path, file: str, damage: Callable[[Path], None],
) -> None:  # fmt: skip
    bench = Bench(tmp_path, tiny_model)
    state = stopped(bench, monkeypatch, 3)
    (best,) = state.parent.glob("best-*")
    there = best / "state.safetensors" if file.startswith("best") else state / file
    damage(there)
    caplog.clear()
    artifact = bench.train("cpo", **KEPT_BEST)
    (warning,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    (aside,) = artifact.path.parent.glob(f"{artifact.path.name}.damaged-*")
    assert warning.startswith(f"{artifact.name}: the state saved after step 3 is damaged (")
    assert there.name in warning
    assert warning.endswith(f"; moved to {aside}; the training starts again from the beginning")
    assert sorted(path.name for path in aside.iterdir()) == ["3", best.name]
    assert not artifact.in_progress.exists()
    assert_same_training(artifact.path, calm)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """What the training of KEPT_BEST makes."""
    return Bench(tmp_path_factory.mktemp("calm"), tiny_model).train("cpo", **KEPT_BEST).path


@pytest.mark.slow
def test_best_weights_damaged_since_the_start_are_not_exported(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, calm: Path
) -> None:
    bench = Bench(tmp_path, tiny_model)

    def damaged(self: ResumeCheckpoint, step: int, real: Callable[..., None] = ResumeCheckpoint.restore_best) -> None:
        flip(self.folder / f"best-{step}" / "state.safetensors")
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "restore_best", damaged)
        with pytest.raises(RunError, match=r"the best weights, .* are damaged \(the checksum of state\.safetensors"):
            bench.train("cpo", **KEPT_BEST)
    assert not list(bench.store.root.glob("checkpoints/*/model.safetensors"))
    assert_same_training(bench.train("cpo", **KEPT_BEST).path, calm)


def test_the_groups_file_of_a_killed_training_is_not_read_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, calm: Path
) -> None:
    bench = Bench(tmp_path, tiny_model)
    state = stopped(bench, monkeypatch, 3)
    (state.parent / "groups.arrow").write_bytes(b"damaged")
    assert_same_training(bench.train("cpo", **KEPT_BEST).path, calm)


@pytest.mark.parametrize(("objective", "architecture"), [("cpo-ranked", "llama"), ("mle", "gpt2")])
def test_a_stopped_training_resumes_bit_for_bit(
    tmp_path: Path,
    new_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    objective: str,
    architecture: str,
) -> None:
    def killed_at(step: int) -> Callable[..., float]:
        def factor(config: Training, at: int) -> float:
            if at == step:
                raise KeyboardInterrupt
            return lr_factor(config, at)

        return factor

    model = new_model(architecture=architecture)  # GPT-2's weights are tied
    settings: dict[str, Any] = {"max_steps": 9, "batch_size": 3, "lr_scheduler_type": "cosine"}
    calm = Bench(tmp_path / "calm", model).train(objective, **settings)
    rough = Bench(tmp_path / "rough", model)
    monkeypatch.setattr("cpo_pipe.trainer.resume.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("cpo_pipe.trainer.resume.SAVE_SHARE", math.inf)
    caplog.set_level("INFO")
    for step in (2, 7):
        with monkeypatch.context() as patch:
            patch.setattr("cpo_pipe.trainer.loop.lr_factor", killed_at(step))
            with pytest.raises(KeyboardInterrupt):
                rough.train(objective, **settings)
    artifact = rough.train(objective, **settings)
    assert "resumes after step 2" in caplog.text
    assert "resumes after step 7" in caplog.text
    ours, theirs = weights(artifact), weights(calm)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    untimed = [[{**row, "seconds": 0} for row in metrics(one)] for one in (artifact, calm)]
    assert untimed[0] == untimed[1]
    assert not list(rough.store.root.glob("checkpoints/.in-progress/*"))
