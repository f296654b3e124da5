"""Trainings stopped by signals, in real processes, and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cpo_pipe.trainer.checkpoint import METRICS_FILE
from tests.support.marks import soak_except
from tests.support.pairs import pairs, write_jsonl
from tests.support.resume import assert_same_training, saved

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
    "mle": {"objective": "mle", "validation": 2, "max_grad_norm": 0.5},
    "pss": {"objective": "pss"},
    "curriculum": {"objective": "dpo", "curriculum": {"by": "margin", "order": "continuous"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def project(commands: Commands, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A recipe, and a store in which everything is made but the trainings of TRAININGS."""
    root = tmp_path_factory.mktemp("project")
    write_jsonl(root / "rows.jsonl", pairs(13))
    # One group a pass: so a step has several, between which a signal can stop it.
    shared = {"init": str(tiny_model), "max_steps": 8, "batch_size": 4, "learning_rate": 1e-3, "eval_steps": 3,
              "micro_batch_tokens": 1}  # fmt: skip
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


def checkpoint_of(store: Path, name: str) -> Path:
    run = json.loads((store.with_suffix(".run") / "run.json").read_text())
    return store / str(run["stages"][f"train {name}"]["artifact"])


@pytest.mark.slow
@pytest.mark.parametrize("name", soak_except(TRAININGS, "ranked", "lora"))
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
