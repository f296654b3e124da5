"""Two processes on this machine, as `accelerate launch` starts them, train what one alone trains."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import OffloadPolicy

from cpo_pipe.cli import main
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.accelerator import new_accelerator
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.objectives import OBJECTIVES
from tests.support.models import make_model
from tests.support.pairs import pairs, write_jsonl

pytestmark = pytest.mark.slow

# Says which process is which; saves after every step, where that is asked for.
SCRIPT = """
import os, sys
from pathlib import Path
from cpo_pipe.cli import main
from cpo_pipe.trainer import resume
if "SAVE_OFTEN" in os.environ:
    resume.SAVE_SECONDS, resume.SAVE_SHARE = 0.0, 1e9
Path(sys.argv.pop(1), os.environ["RANK"]).write_text(str(os.getpid()))
sys.exit(main())
"""
MODES: dict[str, dict[str, Any]] = {
    "DDP": {"distributed_type": "MULTI_GPU"},  # accelerate's word for it on CPUs, too
    "FSDP": {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    },
}
# Gradients that are 0 in theory (of key biases) are rounding errors: with the usual ε, AdamW would make steps of them.
COMMON = {"max_steps": 5, "learning_rate": 1e-3, "adam_epsilon": 1e-3, "validation": 5, "eval_steps": 2}
LONG = 40
"""Steps of a training that is stopped."""
TRAININGS: dict[str, dict[str, Any]] = {
    "cpo": {**COMMON, "objective": "cpo", "batch_size": 7, "beta": 0.5, "mle_weight": 0.3, "max_grad_norm": 1.0,
            "keep": "best"},
    "adapters": {**COMMON, "objective": "cpo", "batch_size": 3, "beta": 0.5, "lora": {"r": 4}},
    "dpo": {**COMMON, "objective": "dpo", "batch_size": 3, "beta": 0.5, "max_steps": 3,
            "curriculum": {"by": "margin", "order": "continuous"}},
    "pss": {**COMMON, "objective": "pss", "batch_size": 3, "max_steps": 3},
    # Rows of several examples in a forward pass, and fewer passes for one process than for the other.
    "mle": {**COMMON, "objective": "mle", "batch_size": 5, "micro_batch_tokens": 64, "gradient_checkpointing": True},
}  # fmt: skip


class Project:
    """A recipe with its groups made, and what one process trains on them."""

    def __init__(self, root: Path):
        self.root = root
        model = str(make_model(root / "model", architecture="gpt2"))  # its output weights are tied
        write_jsonl(root / "rows.jsonl", pairs(41))
        start = {"init": model, "reference": model}
        trainings = {name: {**start, **settings} for name, settings in TRAININGS.items()}
        del trainings["mle"]["reference"], trainings["pss"]["reference"]
        trainings["long"] = {**trainings["cpo"], "max_steps": LONG}
        recipe = {
            "name": "two",
            "data": {"source": str(root / "rows.jsonl"), "tokenizer": model, "test": 1},
            "train": trainings,
            "negatives": {
                "sources": {
                    "autoregressive": {"model": model, "count": 4, "max_new_tokens": 12, "engine": "transformers"},
                },
            },
            "rank": {"by": "none"},
        }
        self.recipe = root / "two.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe))
        for stage in ("prepare", "generate-negatives", "rank"):
            assert main([stage, *self.arguments("groups")]) == 0
        shutil.copytree(root / "groups", root / "alone")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cpo_pipe.trainer.samples.SAMPLE_TOKENS", 64)  # as in the processes that are started
            assert main(["train", *self.arguments("alone")]) == 0

    def arguments(self, store: str) -> list[str]:
        return [str(self.recipe), "--store", str(self.root / store), "--run-dir", str(self.root / f"run-{store}")]

    def launch(self, mode: str, store: str, *names: str, **environment: str) -> subprocess.Popen[str]:
        """`train` in two processes on a copy of the groups (made where it is not there)."""
        if not (self.root / store).exists():
            shutil.copytree(self.root / "groups", self.root / store)
        script, config = self.root / "script.py", self.root / f"{mode}.yaml"
        script.write_text(SCRIPT)
        common = {"num_machines": 1, "machine_rank": 0, "num_processes": 2, "main_process_port": 0, "use_cpu": True}
        config.write_text(yaml.safe_dump({**common, "mixed_precision": "no", **MODES[mode]}))
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        command = [*launcher, str(script), str(self.root), "train", *self.arguments(store), *names]
        # What the test runner's own processes agreed on is nothing to those started here.
        own = ("ACCELERATE", "FSDP")
        environment |= {key: value for key, value in os.environ.items() if not key.startswith(own)}
        pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}, **pipe)

    def trained(self, store: str) -> dict[str, Path]:
        """Checkpoints by the name of their training."""
        found = {}
        for path in (self.root / store / "checkpoints").glob("*/manifest.json"):
            settings = yaml.safe_load((path.parent / "spec.json").read_text())["settings"]
            kind = "adapters" if settings["lora"] else settings["objective"]
            found["long" if settings["max_steps"] == LONG else kind] = path.parent
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("two"))


def assert_same(one: Mapping[str, Path], other: Mapping[str, Path], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, path in one.items():
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (path, other[name]))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=tolerance, atol=tolerance)
        rows = [pq.read_table(folder / METRICS_FILE).to_pylist() for folder in (path, other[name])]
        for mine, yours in zip(*rows, strict=True):
            for key in mine.keys() & yours.keys() - {"seconds"}:
                if yours[key] is None:  # not measured at this step
                    assert mine[key] is None
                else:
                    assert mine[key] == pytest.approx(yours[key], rel=50 * tolerance, abs=50 * tolerance), (name, key)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_what_one_trains(project: Project, mode: str) -> None:
    said, _ = project.launch(mode, mode).communicate(timeout=300)
    trained = project.trained(mode)
    assert trained.keys() == {*TRAININGS, "long"}, said
    assert_same(trained, project.trained("alone"), 5e-5)
    alone, together = (
        {
            (row["example_id"], row["candidate_id"]): row["logprob"]
            for path in Store(project.root / store).root.glob("reference-logprobs/*/shards/*.parquet")
            for row in pq.read_table(path).to_pylist()
        }
        for store in ("alone", mode)
    )
    assert together == pytest.approx(alone, rel=1e-5)
    assert said.count("steps in checkpoints/") == len(trained), "one process speaks for both"


@pytest.mark.parametrize(
    ("mode", "end", "damaged"),
    [
        ("DDP", signal.SIGTERM, ""),
        pytest.param("FSDP", signal.SIGKILL, "", marks=pytest.mark.soak),
        pytest.param("DDP", signal.SIGTERM, "state.safetensors", marks=pytest.mark.soak),
        pytest.param("FSDP", signal.SIGTERM, "shards/__1_0.distcp", marks=pytest.mark.soak),
    ],
)
def test_stopped_or_one_of_them_killed_they_go_on_bit_for_bit(
    project: Project, mode: str, end: signal.Signals, damaged: str
) -> None:
    rough = f"rough-{mode}-{damaged.partition('/')[0]}"
    running = project.launch(mode, rough, "long", SAVE_OFTEN="1")
    states = project.root / rough / "checkpoints" / ".in-progress"
    deadline = time.monotonic() + 200
    while not any(path.name.isdigit() and int(path.name) > 8 for path in states.glob("*/*")):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    victim = running.pid if end == signal.SIGTERM else int((project.root / "1").read_text())
    os.kill(victim, end)
    said, _ = running.communicate(timeout=120)
    assert running.returncode != 0, "the training was over before it was stopped"
    assert not project.trained(rough), said
    if end == signal.SIGTERM:
        assert "stopped by SIGTERM in the training long, saved after step" in said
    if damaged:  # they begin again together
        (file,) = (path for path in states.glob(f"*/*/{damaged}") if path.relative_to(states).parts[1].isdigit())
        os.truncate(file, file.stat().st_size // 2)
    said, _ = project.launch(mode, rough, "long").communicate(timeout=300)
    assert said.count("resumes after step") == (0 if damaged else 1)
    assert said.count("is damaged (") == (1 if damaged else 0)
    undisturbed = {"long": project.trained(mode)["long"]}  # by the test above
    assert_same(project.trained(rough), undisturbed, 0.0)


def test_other_commands_and_other_ways_of_accelerate_are_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["prepare", *project.arguments("alone")]) == 2
    assert "error: started in 2 processes: only train does its work in several" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["train", *project.arguments("alone"), "cpo", "--set", "train.cpo.learning_rate=0.5"]) == 2
    error = capsys.readouterr().err
    assert "train.cpo.dtype is float32, but accelerate is configured for mixed_precision bf16" in error


def test_cpu_offload_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offloading:
        num_processes, distributed_type = 1, DistributedType.FSDP
        state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True))

    monkeypatch.setattr("cpo_pipe.trainer.accelerator.Accelerator", lambda **_: Offloading())
    with pytest.raises(InputError, match="FSDP with CPU offload, which train does not support; set fsdp_offload_par"):
        new_accelerator("t", OBJECTIVES.parse({"init": "m", "objective": "mle", "max_steps": 1}), None)
    Offloading.state.fsdp_plugin.cpu_offload = OffloadPolicy()
    assert new_accelerator("t", OBJECTIVES.parse({"init": "m", "objective": "mle", "max_steps": 1}), None)
