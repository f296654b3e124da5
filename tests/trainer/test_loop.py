"""The training loop: losses that are not finite, how a batch is computed, trackers."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.store import Artifact, Rows
from cpo_pipe.trainer.curriculum import shuffled_batches
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.train import train
from tests.support.marks import slow_except
from tests.support.resume import assert_same_training, in_progress_of, interrupted_at, save_often, saved
from tests.support.training import CANDIDATES, Bench, metrics, validation_ids

# ── what is not finite ────────────────────────────────────────────────────────────────────────────────────────────────


def saved_tensors(bench: Bench) -> Iterator[torch.Tensor]:
    for file in bench.store.root.glob("checkpoints/.in-progress/*/*/state.safetensors"):
        yield from load_file(file).values()


@pytest.mark.parametrize("value", slow_except([math.nan, -math.inf], -math.inf))
@pytest.mark.parametrize("objective", slow_except(["cpo", "cpo-ranked"], "cpo"))
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


# ── how a batch is computed ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
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


# ── trackers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
