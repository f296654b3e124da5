"""The training loop: stopped and resumed, faced with what is not finite, measuring held-out groups, logging."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.store import Artifact, Rows, Store, atomic
from cpo_pipe.trainer.accelerator import new_accelerator
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.curriculum import shuffled_batches
from cpo_pipe.trainer.monitors import repetition
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.optimizer import lr_factor
from cpo_pipe.trainer.resume import ResumeCheckpoint
from cpo_pipe.trainer.samples import SAMPLE_TOKENS, SAMPLES
from cpo_pipe.trainer.train import train
from cpo_pipe.trainer.validation_split import split_validation
from tests.support.architectures import table
from tests.support.marks import slow_except
from tests.support.pairs import pairs, write_jsonl
from tests.support.training import CANDIDATES, Bench, measured, metrics, naive_logprob, weights

# ── stopped by signals: real processes ───────────────────────────────────────────────────────────────────────────────

SERVER = """
import json, math, os, sys
import torch, transformers, pyarrow.parquet
from cpo_pipe.cli import main
from cpo_pipe.trainer import loop
from cpo_pipe.trainer import resume
from cpo_pipe.trainer.objectives import mle, preference

def prepare(step, passes, signals, last_save):
    at = {"step": None, "passes": 0}
    def fire():
        if (at["step"], at["passes"]) == (step, passes):
            for number in signals:
                os.kill(os.getpid(), number)
    def lr_factor(config, now, real=loop.lr_factor):
        at.update(step=now, passes=0)
        if now == last_save:
            resume.SAVE_SECONDS = math.inf
        fire()
        return real(config, now)
    def counted(real):
        def figures(*arguments):
            found = real(*arguments)
            at["passes"] += 1
            fire()
            return found
        return figures
    if last_save is not None:
        resume.SAVE_SECONDS, resume.SAVE_SHARE = 0.0, math.inf
    loop.lr_factor = lr_factor
    for objective in (mle.MLE, preference.PreferenceTraining):
        objective.figures = counted(objective.figures)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        prepare(job["step"], job["passes"], job["signals"], job["last_save"])
        for command in job["commands"]:
            status = main(command)
            if status:
                break
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Imports once, then forks a process for each job: the command line, with signals at an exact place of the training.

The signals come before a step (`passes` 0) or within it, after so many forward passes. With `last_save` the state is
saved after every step up to that one.
"""


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    status: int
    said: str


@dataclass
class Commands:
    """Runs commands of a recipe, each job in a process of its own."""

    folder: Path
    server: "subprocess.Popen[str]"
    jobs: int = field(default=0)

    def __call__(
        self,
        *commands: Sequence[str],
        step: int | None = None,
        passes: int = 0,
        signals: Sequence[signal.Signals] = (),
        last_save: int | None = None,
    ) -> Ended:
        self.jobs += 1
        log = self.folder / f"{self.jobs}.log"
        job = {"commands": commands, "step": step, "passes": passes, "signals": signals, "last_save": last_save}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(job | {"log": str(log)}), file=self.server.stdin, flush=True)
        answer = self.server.stdout.readline()
        assert answer, "the server died"
        return Ended(int(answer), log.read_text())


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # As many threads here and there: their number decides the order of sums.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as server:
        yield Commands(tmp_path_factory.mktemp("logs"), server)
        assert server.stdin is not None
        server.stdin.close()


TRAININGS: dict[str, dict[str, Any]] = {
    "ranked": {"objective": "cpo-ranked", "mle_weight": 0.3, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
               "warmup_steps": 2},
    "best": {"objective": "cpo-ranked", "validation": 4, "keep": "best", "eval_steps": 1, "learning_rate": 0.05,
             "beta": 0.3, "warmup_steps": 8},
    "lora": {"objective": "cpo-ranked", "lora": {"r": 4}, "gradient_checkpointing": True},
    "mle": {"objective": "mle", "validation": 2, "micro_batch_tokens": 1, "max_grad_norm": 0.5},
    "pss": {"objective": "pss", "micro_batch_tokens": 1},
    "curriculum": {"objective": "dpo", "curriculum": {"by": "margin", "order": "continuous"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def project(commands: Commands, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe, and a store in which everything is made but the trainings of TRAININGS."""
    root = tmp_path_factory.mktemp("project")
    write_jsonl(root / "rows.jsonl", pairs(13))
    shared = {"init": str(tiny_model), "max_steps": 8, "batch_size": 4, "learning_rate": 1e-3, "eval_steps": 3}
    listwise = {"reference": str(tiny_model), "beta": 0.1}
    content = {
        "data": {"source": str(root / "rows.jsonl"), "tokenizer": str(tiny_model), "test": 1},
        "train": {
            # Its log-probs of the reference are everyone's.
            "first": {**shared, **listwise, "objective": "cpo", "max_steps": 1},
            **{name: {**shared, **({} if name in ("mle", "pss") else listwise), **settings}
               for name, settings in TRAININGS.items()},
        },
        "negatives": {"sources": {"autoregressive": {"model": str(tiny_model), "count": 3, "max_new_tokens": 8,
                                                     "engine": "transformers"}}},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe, store = root / "recipe.yaml", root / "made"
    stages = [command_of(stage, recipe, store) for stage in ("prepare", "generate-negatives", "rank")]
    made = commands(*stages, command_of("train", recipe, store, "first"))
    assert made.status == 0, made.said
    shutil.copytree(root / "made", root / "calm")
    return root


def undisturbed(commands: Commands, project: Path, name: str) -> Path:
    """The checkpoint of a training that nothing stopped, which the first caller makes."""
    ended = commands(command_of("train", project / "recipe.yaml", project / "calm", name))
    assert ended.status == 0, ended.said
    checkpoint = checkpoint_of(project / "calm", name)
    if name == "best":  # else keep = best would be tried on what is kept anyway
        losses = pq.read_table(checkpoint / METRICS_FILE)["validation_loss"].drop_null().to_pylist()
        assert losses.index(min(losses)) not in (0, len(losses) - 1), losses
    return checkpoint


def command_of(stage: str, recipe: Path, store: Path, *names: str, settings: Sequence[str] = ()) -> list[str]:
    options = [part for setting in settings for part in ("--set", setting)]
    return [stage, str(recipe), *names, "--store", str(store), "--run-dir", str(store.with_suffix(".run")), *options]


def saved(store: Path) -> list[str]:
    """The states of trainings in progress."""
    return sorted(path.name for path in store.glob("checkpoints/.in-progress/*/*") if path.is_dir())


def checkpoint_of(store: Path, name: str) -> Path:
    run = json.loads((store.with_suffix(".run") / "run.json").read_text())
    return store / str(run["stages"][f"train {name}"]["artifact"])


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Weights and metrics, to the last bit."""
    left, right = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)
    tables = [pq.read_table(folder / METRICS_FILE).drop(["seconds"]) for folder in (ours, theirs)]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("name", slow_except(TRAININGS, "best"))
def test_a_training_stopped_by_signals_ends_bit_for_bit_as_if_it_was_not(
    commands: Commands, project: Path, tmp_path: Path, name: str
) -> None:
    store = shutil.copytree(project / "made", tmp_path / "rough")
    command = command_of("train", project / "recipe.yaml", store, name)
    stopped = commands(command, step=2, signals=[signal.SIGTERM])
    assert stopped.status == 130
    assert f"stopped by SIGTERM in the training {name}, saved after step 2; what was made is kept" in stopped.said
    assert "2" in saved(store)

    killed = commands(command, step=5, passes=1, signals=[signal.SIGKILL], last_save=3)
    assert killed.status == -signal.SIGKILL
    assert "resumes after step 2" in killed.said
    assert [state for state in saved(store) if not state.startswith("best")] == ["4"]

    # Within a step: what was accumulated of it is made again, and nothing of it is counted twice.
    stopped = commands(command, step=6, passes=1, signals=[signal.SIGINT])
    assert stopped.status == 130
    assert f"stopped by SIGINT in the training {name}, saved after step 6" in stopped.said
    assert "resumes after step 4" in stopped.said

    # What is no part of a training's identity may change in between; it keeps what it began with.
    cut = [f"train.{name}.micro_batch_tokens=64", f"train.{name}.logits_mb=1", f"train.{name}.attention=padded"]
    ended = commands(command_of("train", project / "recipe.yaml", store, name, settings=cut))
    assert ended.status == 0, ended.said
    assert "resumes after step 6" in ended.said
    assert saved(store) == []
    assert_same_training(checkpoint_of(store, name), undisturbed(commands, project, name))


def test_a_training_that_goes_on_otherwise_is_checked_anew(commands: Commands, project: Path, tmp_path: Path) -> None:
    store = shutil.copytree(project / "made", tmp_path / "rough")
    recipe = project / "recipe.yaml"
    assert commands(command_of("train", recipe, store, "ranked"), step=2, signals=[signal.SIGTERM]).status == 130
    again = commands(command_of("train", recipe, store, "ranked"), step=3, signals=[signal.SIGTERM])
    assert "checked in" not in again.said, "nothing changed"
    changed = command_of("train", recipe, store, "ranked", settings=["train.ranked.gradient_checkpointing=true"])
    ended = commands(changed)
    assert ended.status == 0, ended.said
    assert "resumes under other conditions than before (gradient_checkpointing False → True)" in ended.said
    assert ended.said.count("train ranked: attention backend cascade, equivalent up to") == 1
    rows, calm = (
        pq.read_table(checkpoint / METRICS_FILE)["loss"].drop_null().to_pylist()
        for checkpoint in (checkpoint_of(store, "ranked"), undisturbed(commands, project, "ranked"))
    )
    assert rows == pytest.approx(calm, rel=1e-5)


@pytest.mark.parametrize("number", slow_except([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_second_signal_is_not_waited_for(
    commands: Commands, project: Path, tmp_path: Path, number: signal.Signals
) -> None:
    store = shutil.copytree(project / "made", tmp_path / "rough")
    command = command_of("train", project / "recipe.yaml", store, "ranked")
    stopped = commands(command, step=5, passes=1, signals=[number, number], last_save=2)
    assert stopped.status == 130
    assert "what was made is kept" in stopped.said
    assert "saved after" not in stopped.said
    assert saved(store) == ["3"], "what was saved before is all there is"


# ── the state of a training in progress ──────────────────────────────────────────────────────────────────────────────


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
        ("metrics.parquet", cut),
        ("facts.json", Path.unlink),
        ("best/state.safetensors", flip),
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


def save_often(patch: pytest.MonkeyPatch) -> None:
    """Save after every step."""
    patch.setattr("cpo_pipe.trainer.resume.SAVE_SECONDS", 0.0)
    patch.setattr("cpo_pipe.trainer.resume.SAVE_SHARE", math.inf)


def in_progress_of(bench: Bench) -> list[str]:
    """The whole states of trainings in progress."""
    return [name for name in saved(bench.store.root) if not name.startswith("best")]


def saved_tensors(bench: Bench) -> Iterator[torch.Tensor]:
    for file in bench.store.root.glob("checkpoints/.in-progress/*/*/state.safetensors"):
        yield from load_file(file).values()


# ── what is not finite ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("objective", ["cpo", "cpo-ranked"])
def test_a_group_whose_loss_is_not_finite_is_named_and_the_training_goes_on_once_it_is_mended(
    tmp_path: Path, tiny_model: Path, objective: str, value: float
) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "batch_size": 1}
    order = [list(CANDIDATES)[index] for (index,) in shuffled_batches(len(CANDIDATES), 1, 5, seed=0)]
    calm = Bench(tmp_path / "calm", tiny_model).train(objective, **settings)
    bench = Bench(tmp_path / "rough", tiny_model)
    spoil(bench, order[2], value)
    with pytest.raises(RunError, match=rf"the loss is (nan|inf) at step 2, because of group {order[2]}; look at"):
        bench.train(objective, **settings)
    assert in_progress_of(bench) == ["2"]
    assert all(bool(tensor.isfinite().all()) for tensor in saved_tensors(bench))
    shutil.rmtree(bench.store.root / "reference-logprobs")
    assert_same_training(bench.train(objective, **settings).path, calm.path)


def spoil(bench: Bench, name: str, value: float) -> Rows:
    """Record a log-prob of the reference for a negative of this group, before any is computed."""
    prompt, candidates, _ = bench.candidates[name]
    rows = bench.store.rows("reference-logprobs", {"model": bench.model.fingerprint, "dtype": "float32"})
    wrong = {"example_id": name, "candidate_id": candidate_id(prompt, candidates[1]), "logprob": value}
    with rows.writer() as writer:
        writer.add([wrong | {"num_tokens": len(candidates[1])}])
    return rows


def test_of_a_batch_only_the_broken_group_is_named(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    spoil(bench, "c", math.nan)
    with pytest.raises(RunError, match="the loss is nan at step 0, because of group c; look at"):
        bench.train("cpo", batch_size=4)
    assert saved(bench.store.root) == [], "there was no good state yet"


def test_a_validation_group_whose_loss_is_not_finite_is_named(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    name = validation_ids(bench, 1).pop()
    spoil(bench, name, math.nan)
    with pytest.raises(RunError, match=rf"validation loss.* {name}\b"):
        bench.train("cpo", batch_size=3, validation=1, keep="best")


def test_a_blow_up_leaves_the_last_good_state_and_never_one_that_is_not_finite(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A decay of −learning_rate·weight_decay overflows the weights themselves in step 3; the loss shows it only in
    # step 4.
    settings: dict[str, Any] = {"max_steps": 6, "weight_decay": 300.0, "learning_rate": 1e-4}
    save_often(monkeypatch)
    calm = Bench(tmp_path / "calm", tiny_model).train("mle", **settings)
    bench = Bench(tmp_path / "rough", tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr("cpo_pipe.trainer.loop.lr_factor", lambda _, step: 1e40 if step == 3 else 1.0)
        with pytest.raises(RunError, match=r"not finite|the loss is nan at step 4"):
            bench.train("mle", **settings)
    assert all(bool(tensor.isfinite().all()) for tensor in saved_tensors(bench))
    assert in_progress_of(bench) == ["3"]
    assert_same_training(bench.train("mle", **settings).path, calm.path)


@pytest.mark.parametrize("objective", ["mle", "cpo"])
def test_with_an_absurd_learning_rate_nothing_that_is_not_finite_is_kept(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    save_often(monkeypatch)
    bench = Bench(tmp_path, tiny_model)
    with pytest.raises(RunError, match=r"lower train\.t\.learning_rate"):
        bench.train(objective, max_steps=9, learning_rate=1e30, validation=1, keep="best", eval_steps=1)
    assert all(bool(tensor.isfinite().all()) for tensor in saved_tensors(bench))
    assert not list(bench.store.root.glob("checkpoints/*/model.safetensors"))


# ── held-out groups ──────────────────────────────────────────────────────────────────────────────────────────────────


def validation_ids(bench: Bench, count: int) -> set[str]:
    """Which groups of a bench are held out."""
    config = OBJECTIVES.parse({"init": "m", "objective": "cpo", "reference": "m", "validation": count})
    groups = table({name: (prompt, candidates) for name, (prompt, candidates, _) in bench.candidates.items()})
    trained, validation = split_validation("t", config, groups)
    assert sorted([*trained, *validation]) == list(range(groups.num_rows))
    return set(groups["example_id"].take(validation).to_pylist())


def many(count: int) -> dict[str, Any]:
    return {f"g{number}": ([5 + number, 6], [[7, 0], [8 + number, 0]], [0, 1]) for number in range(count)}


def test_which_groups_are_validation_hardly_depends_on_which_others_there_are(tmp_path: Path, tiny_model: Path) -> None:
    whole = validation_ids(Bench(tmp_path, tiny_model, many(40)), 8)
    assert len(whole) == 8
    backwards = dict(reversed(many(40).items()))
    assert validation_ids(Bench(tmp_path, tiny_model, backwards), 8) == whole
    for gone in many(40):
        left = {name: group for name, group in many(40).items() if name != gone}
        now = validation_ids(Bench(tmp_path, tiny_model, left), 8)
        assert whole - {gone} <= now, "one is replaced at most"
        assert (now == whole) == (gone not in whole)
    assert validation_ids(Bench(tmp_path, tiny_model, many(40)), 7) < whole


def test_validation_groups_leave_no_trace_in_the_weights(tmp_path: Path, tiny_model: Path) -> None:
    names = validation_ids(Bench(tmp_path, tiny_model), 2)
    settings: dict[str, Any] = {"validation": 2, "batch_size": 2, "max_steps": 3, "mle_weight": 0.5}
    artifact = Bench(tmp_path / "a", tiny_model).train("cpo", **settings)
    assert artifact.manifest["groups"] == 2
    others = {name: ([40, 41], [[50, 51, 0], [52, 0]], [0, 1]) if name in names else group
              for name, group in CANDIDATES.items()}  # fmt: skip
    again = Bench(tmp_path / "b", tiny_model, others).train("cpo", **settings)
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(artifact).items())
    assert measured(again, "validation_loss")[0] != measured(artifact, "validation_loss")[0]
    # Without them in the selection at all, it is the same training.
    left = {name: group for name, group in CANDIDATES.items() if name not in names}
    alone = Bench(tmp_path / "c", tiny_model, left).train("cpo", **settings | {"validation": 0})
    assert all(torch.equal(weights(alone)[name], tensor) for name, tensor in weights(artifact).items())


def test_validation_measurements_are_those_of_the_weights_after_the_step(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    settings: dict[str, Any] = {"validation": 2, "batch_size": 2, "eval_steps": 2, "beta": 0.5, "mle_weight": 0.25}
    rows = pq.read_table(bench.train("cpo", max_steps=6, **settings).path / METRICS_FILE).to_pylist()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["validation_loss"] is not None] == [0, 2, 4, 6]
    assert [row["step"] for row in rows if row["loss"] is not None] == [0, 1, 2, 3, 4, 5]
    frozen = AutoModelForCausalLM.from_pretrained(bench.model.path)
    for steps in (0, 4, 6):
        made = bench.train("cpo", max_steps=steps, **settings).path if steps else bench.model.path
        model = AutoModelForCausalLM.from_pretrained(made)
        listwise, drop, nll, tokens, won = [], 0.0, 0.0, 0, 0
        for name in validation_ids(bench, 2):
            prompt, candidates, _ = CANDIDATES[name]
            with torch.no_grad():
                policy = torch.stack([naive_logprob(model, prompt, ids) for ids in candidates])
                reference = torch.stack([naive_logprob(frozen, prompt, ids) for ids in candidates])
            reward = 0.5 * (policy - reference)
            listwise.append(float(reward.logsumexp(0) - reward[0]))
            won += bool(reward[0] > reward[1:].max())
            drop += float(reference[0] - policy[0])
            nll -= float(policy[0])
            tokens += len(candidates[0])
        row = rows[steps]
        assert row["validation_preference_loss"] == pytest.approx(sum(listwise) / 2, rel=1e-4)
        assert row["validation_loss"] == pytest.approx(sum(listwise) / 2 + 0.25 * nll / tokens, rel=1e-4)
        assert row["validation_target_logprob"] == pytest.approx(-nll / 2, rel=1e-4)
        assert row["validation_target_drop_per_token"] == pytest.approx(drop / tokens, rel=1e-3, abs=1e-4)
        assert row["validation_reward_accuracy"] == won / 2


def test_of_mle_the_examples_validation_are_measured_too(tmp_path: Path, tiny_model: Path) -> None:
    bench = Bench(tmp_path, tiny_model)
    artifact = bench.train("mle", max_steps=2, batch_size=2, validation=1)
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    prompt, (target, *_), _ = CANDIDATES[validation_ids(bench, 1).pop()]
    with torch.no_grad():
        nll = -float(naive_logprob(model, prompt, target)) / len(target)
    assert measured(artifact, "validation_loss")[2] == pytest.approx(nll, rel=1e-4)


BEST: dict[str, Any] = {"batch_size": 2, "validation": 2, "eval_steps": 2, "learning_rate": 0.003, "beta": 0.1}


def test_keep_best_exports_the_weights_of_the_lowest_validation_loss(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "a", tiny_model)
    artifact = bench.train("cpo", max_steps=9, keep="best", **BEST)
    losses = measured(artifact, "validation_loss")
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < 9, "neither the first nor the last"
    then = bench.train("cpo", max_steps=best, **BEST)
    assert all(torch.equal(weights(artifact)[name], tensor) for name, tensor in weights(then).items())
    # Stopped right after every step, the best one too, it keeps the same.
    rough = Bench(tmp_path / "b", tiny_model)
    for step in range(1, 9):
        with monkeypatch.context() as patch:
            patch.setattr("cpo_pipe.trainer.loop.lr_factor", interrupted_at(step))
            with pytest.raises(KeyboardInterrupt, match=f"saved after step {step}"):
                rough.train("cpo", max_steps=9, keep="best", **BEST)
    assert_same_training(rough.train("cpo", max_steps=9, keep="best", **BEST).path, artifact.path)


def interrupted_at(step: int) -> Callable[[Training, int], float]:
    """`lr_factor` with a real signal before a step."""

    def factor(config: Training, at: int) -> float:
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return lr_factor(config, at)

    return factor


def test_of_equally_good_weights_those_that_came_first_are_kept(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small a learning rate changes nothing; as in a training whose validation loss has come down to 0.
    save_often(monkeypatch)
    bench = Bench(tmp_path, tiny_model)
    artifact = bench.train("cpo", max_steps=4, keep="best", **BEST | {"learning_rate": 1e-30, "eval_steps": 1})
    losses = measured(artifact, "validation_loss")
    assert list(losses) == [0, 1, 2, 3, 4]
    assert len({*losses.values()}) == 1
    assert all(torch.equal(weights(artifact)[name], tensor) for name, tensor in weights_at(tiny_model).items())


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_where_no_step_is_better_the_initial_weights_are_kept_and_that_is_said(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lora: Any
) -> None:
    # From a model that knows the targets by heart, so large a learning rate leads only away.
    settings: dict[str, Any] = {
        "max_steps": 4,
        "validation": 1,
        "batch_size": 3,
        "eval_steps": 1,
        "learning_rate": 1.0,
        "lora": lora,
    }
    learnt = Bench(tmp_path / "learnt", tiny_model).train("mle", max_steps=30, learning_rate=0.01).path
    caplog.clear()
    bench = Bench(tmp_path / "a", learnt)
    artifact = bench.train("mle", keep="best", **settings)
    losses = measured(artifact, "validation_loss")
    assert min(losses.values()) == losses[0] < min(losses[step] for step in (1, 2, 3, 4))
    before = weights_at(learnt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(artifact).items())
    said = [record.getMessage() for record in caplog.records if "keeps the initial weights" in record.getMessage()]
    assert said == [
        f"train t: no step lowered the validation loss below the {losses[0]:.4f} of the initial weights; keeps the "
        "initial weights; lower learning_rate, or measure more often (eval_steps)"
    ]
    # Stopped and resumed, too.
    rough = Bench(tmp_path / "b", learnt)
    with monkeypatch.context() as patch:
        patch.setattr("cpo_pipe.trainer.loop.lr_factor", interrupted_at(2))
        with pytest.raises(KeyboardInterrupt):
            rough.train("mle", keep="best", **settings)
    assert_same_training(rough.train("mle", keep="best", **settings).path, artifact.path)


def weights_at(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("count", [4, 5])
def test_as_many_validation_groups_as_there_are_are_refused(tmp_path: Path, tiny_model: Path, count: int) -> None:
    bench = Bench(tmp_path, tiny_model)
    with pytest.raises(InputError, match=rf"^train\.t\.validation is {count}, but there are only 4 groups"):
        bench.train("cpo", validation=count)
    assert bench.train("cpo", validation=3).manifest["groups"] == 1


# ── how the work is cut ──────────────────────────────────────────────────────────────────────────────────────────────


def test_how_a_batch_is_computed_changes_no_metric(tmp_path: Path, tiny_model: Path) -> None:
    def figures(number: int, **how: Any) -> list[dict[str, float]]:
        bench = Bench(tmp_path / str(number), tiny_model)
        settings: dict[str, Any] = {
            "max_steps": 4,
            "beta": 0.5,
            "mle_weight": 0.3,
            "max_grad_norm": 1.0,
            "validation": 1,
        }
        artifact = bench.train("cpo-ranked", batch_size=5, eval_steps=2, **settings, **how)
        asked = how.get("attention", "cascade")
        assert artifact.manifest["computed"]["attention"] == asked
        return [{key: value for key, value in row.items() if key != "seconds" and value is not None}
                for row in metrics(artifact)]  # fmt: skip

    ways: list[dict[str, Any]] = [
        {"attention": "cascade"},
        {"attention": "split"},
        {"attention": "dense"},
        {"attention": "padded", "micro_batch_tokens": 1},
        {"attention": "padded", "micro_batch_tokens": 60},
        {"attention": "padded", "micro_batch_tokens": 8192},
        {"attention": "cascade", "gradient_checkpointing": True},
        {"attention": "dense", "gradient_checkpointing": True, "logits_mb": 1},
    ]
    first, *others = [figures(number, **how) for number, how in enumerate(ways)]
    assert first[3]["grad_norm"] > 1, "clipping has something to do"
    for rows in others:
        for row, expected in zip(rows, first, strict=True):
            # Differences of sums around 0 need an absolute tolerance.
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


# ── sampled text ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_stay_within_the_models_context(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    # The prompt and its candidates fit; 64 tokens more would not, and GPT-2 has no positions for them.
    long = {f"{token}": ([token] * 110, [[6] * 9, [7]], [0, 1]) for token in range(8, 16)}
    bench = Bench(tmp_path, new_model(architecture="gpt2"), long)
    bench.sample_tokens = SAMPLE_TOKENS
    assert metrics(bench.train("cpo", max_steps=1))[0]["repetition"] is not None


def test_a_model_with_several_eos_tokens_can_be_sampled_from(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    bench = Bench(tmp_path, new_model(eos_token_id=[0, 5]))
    assert metrics(bench.train("cpo", max_steps=1))[0]["repetition"] is not None


def test_samples_taken_together_are_those_taken_alone(tmp_path: Path, new_model: Callable[..., Path]) -> None:
    folder = new_model(eos_token_id=list(range(0, 200, 9)))
    prompts = [[token, 7, token + 1][: 2 + token % 2] for token in range(10, 10 + SAMPLES)]
    groups = {str(number): (prompt, [[6], [8]], [0, 1]) for number, prompt in enumerate(prompts)}
    bench = Bench(tmp_path, folder, groups)
    bench.sample_tokens = SAMPLE_TOKENS
    model = AutoModelForCausalLM.from_pretrained(folder)
    alone = [
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=SAMPLE_TOKENS,
                       do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        for ids in prompts
    ]  # fmt: skip
    assert len({len(sample) for sample in alone}) > 1, "some end before others"
    assert 0 < repetition(alone) < 1
    assert metrics(bench.train("cpo", max_steps=1, learning_rate=1e-9))[0]["repetition"] == repetition(alone)


def test_sampling_changes_nothing_of_the_training(tmp_path: Path, tiny_model: Path) -> None:
    often = Bench(tmp_path / "a", tiny_model).train("cpo", max_steps=4, eval_steps=1, gradient_checkpointing=True)
    seldom = Bench(tmp_path / "b", tiny_model).train("cpo", max_steps=4, eval_steps=100)
    assert list(measured(seldom, "repetition")) == [0, 4]
    assert list(measured(often, "repetition")) == [0, 1, 2, 3, 4]
    assert all(torch.equal(weights(often)[name], tensor) for name, tensor in weights(seldom).items())


# ── trackers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tracked(bench: Bench, log_dir: Path, name: str, **settings: Any) -> Artifact:
    values = {
        "init": "m",
        "objective": "cpo",
        "reference": "m",
        "max_steps": 5,
        "batch_size": 4,
        "learning_rate": 1e-3,
        **settings,
    }
    return train(name, OBJECTIVES.parse(values), bench.store, bench.inputs("cpo"), log_dir, LocalExecutor())


def test_tensorboard_gets_the_metrics_of_each_step_of_each_training(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    bench, log_dir = Bench(tmp_path, tiny_model), tmp_path / "run"
    artifacts = {"one": tracked(bench, log_dir, "one", report_to=["tensorboard"])}
    with monkeypatch.context() as patch:  # stopped and resumed, too
        patch.setattr("cpo_pipe.trainer.loop.lr_factor", interrupted_at(3))
        with pytest.raises(KeyboardInterrupt):
            tracked(bench, log_dir, "two", report_to=["tensorboard"], seed=1, beta=1.0)
    artifacts["two"] = tracked(bench, log_dir, "two", report_to=["tensorboard"], seed=1, beta=1.0)
    folders = {file.parent for file in log_dir.rglob("events.out.tfevents.*")}
    found = []
    for folder in folders:
        accumulator = events.EventAccumulator(str(folder))
        accumulator.Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            found.append({tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
                          for tag in ("loss", "learning_rate", "reward_accuracy", "grad_norm")})  # fmt: skip
    wanted = [
        {tag: [(row["step"], pytest.approx(row[tag], rel=1e-6, abs=1e-12)) for row in metrics(artifact)]
         for tag in ("loss", "learning_rate", "reward_accuracy", "grad_norm")}
        for artifact in artifacts.values()
    ]  # fmt: skip
    # Two trainings of a run must not be drawn as one curve.
    assert len(found) == 2
    assert all(one in found for one in wanted)


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path: Path, tiny_model: Path) -> None:
    from accelerate.utils import is_mlflow_available, is_wandb_available

    absent = [name for name, there in (("wandb", is_wandb_available()), ("mlflow", is_mlflow_available())) if not there]
    if not absent:
        pytest.skip("all trackers are installed")
    bench = Bench(tmp_path, tiny_model)
    with pytest.raises(InputError, match=rf"^train\.t\.report_to: .*{absent[0]}"):
        tracked(bench, tmp_path / "run", "t", report_to=[absent[0]])
    assert not list(bench.store.root.glob("reference-logprobs/*/shards/*"))
