"""Rounds of self-play on a real tiny project: whose negatives, which reference, what is made again and what waits."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.store import Store

LATEST = ("--set", "evaluate.systems.latest={model: cpo@3}")


def iterations(count: int) -> tuple[str, ...]:
    return "--set", f"iterations={count}"


def stages(project) -> dict[str, dict]:
    return json.loads((project.root / "runs/tiny/latest/run.json").read_text())["stages"]


def checkpoint(project, name: str) -> Path:
    return project.store / stages(project)[f"train {name}"]["artifact"]


def spec(project, name: str) -> dict[str, Any]:
    return json.loads((checkpoint(project, name) / "spec.json").read_text())


def fingerprint(project, name: str) -> str:
    return json.loads((checkpoint(project, name) / "manifest.json").read_text())["fingerprint"]


def rows(project, artifact: str) -> list[dict]:
    """All rows of an artifact of rows."""
    folder = project.store / artifact
    files = Store(project.store).rows(folder.parent.name, json.loads((folder / "spec.json").read_text())).files()
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def hashes(project, kind: str) -> set[str]:
    return {path.parent.name for path in project.store.glob(f"{kind}/*/spec.json")}


def ok(result) -> Any:
    assert result.status == 0, result.err
    return result


@pytest.mark.slow
def test_three_iterations(project) -> None:
    """Each from the model before: its negatives, its start and its reference; and each round's artifacts its own."""
    options = (*iterations(3), *LATEST, "--set", "train.cpo.batch_size=16")  # all groups in the first step
    ok(project.cli("run", "tiny.yaml", *options))
    done = stages(project)
    before = {"cpo": "start", "cpo@2": "cpo", "cpo@3": "cpo@2"}
    assert len({fingerprint(project, name) for name in ("start", *before)}) == 4
    made = {name: "" if name == "cpo" else f" of {name}" for name in before}
    for name, model in before.items():
        (artifact,) = done[f"generate-negatives{made[name]}"]["artifact"]
        negatives = rows(project, artifact)
        assert len(negatives) == 16 * 3
        assert {row["generator"] for row in negatives} == {fingerprint(project, model)}

        identity = spec(project, name)
        assert identity["reference"] == identity["init"]["model"] == fingerprint(project, model)
        groups = rows(project, done[f"rank{made[name]}"]["artifact"])
        written = {(row["example_id"], tuple(row["token_ids"])) for row in negatives}
        for group in groups:
            for candidate in group["candidates"][1:]:
                assert (group["example_id"], tuple(candidate["token_ids"])) in written
        assert identity["groups"]["candidates"][0]["negatives"]["generator"] == fingerprint(project, model)
        sizes = [len(group["candidates"]) for group in groups]
        logs = [math.log(size) for size in sizes if size > 1]
        losses = pq.read_table(checkpoint(project, name) / "training-metrics.parquet")["loss"].to_pylist()
        assert losses[0] == pytest.approx(sum(logs) / len(logs), abs=1e-4)
    assert len(hashes(project, "negatives")) == len(hashes(project, "groups")) == 3
    assert len(hashes(project, "reference-logprobs")) >= 3

    figures = pq.read_table(project.root / "runs/tiny/latest/metrics.parquet").to_pylist()
    assert {"start", "cpo", "latest"} <= {row["system"] for row in figures}
    page = (project.root / "runs/tiny/latest/report.html").read_text()
    for name in ("cpo@2", "cpo@3"):
        assert f"negatives of {name}" in page
        assert done[f"rank of {name}"]["artifact"] in page
        assert f"checkpoints/{checkpoint(project, name).name}" in page

    kept = project.made()
    again = ok(project.cli("run", "tiny.yaml", *options))
    assert "train cpo@3: reused" in again.err
    assert project.made() == kept
    assert project.cli("store", "gc").out == "nothing to delete\n"
    ok(project.cli("store", "gc", "--delete"))
    assert project.made() == kept
    assert project.cli("store", "verify").status == 0


@pytest.mark.slow
def test_another_iteration_makes_nothing_of_those_before(made) -> None:
    ok(made.cli("run", "tiny.yaml", *iterations(2)))
    kept, kinds = made.made(), ("negatives", "groups", "checkpoints")
    counts = {kind: len(hashes(made, kind)) for kind in kinds}
    assert counts == {"negatives": 2, "groups": 2, "checkpoints": 3}
    ok(made.cli("run", "tiny.yaml", *iterations(3)))
    assert {kind: len(hashes(made, kind)) for kind in kinds} == {kind: n + 1 for kind, n in counts.items()}
    now = made.made()
    assert {path: now.get(path) for path in kept} == kept


@pytest.mark.slow
def test_stage_by_stage_each_says_what_it_waits_for(project) -> None:
    """Each stage does what it can in all iterations; what cannot be done yet names the command that unblocks it."""

    def refused(*arguments: str) -> str:
        result = project.cli(*arguments, *iterations(3))
        assert result.status == 2
        return result.error()

    options = " ".join(iterations(3))
    ok(project.cli("prepare", "tiny.yaml", *iterations(3)))
    assert refused("train", "tiny.yaml", "cpo@2") == (
        f"error: the training start is not done: run `cpo-pipe train tiny.yaml start {options}`"
    )
    ok(project.cli("train", "tiny.yaml", "start", *iterations(3)))
    waiting = f"cpo@2 is waiting: the training cpo is not done: run `cpo-pipe train tiny.yaml cpo {options}`"
    needed = f"48 negatives are missing: run `cpo-pipe generate-negatives tiny.yaml {options}`"
    assert refused("rank", "tiny.yaml") == f"error: {needed}"
    first = ok(project.cli("generate-negatives", "tiny.yaml", *iterations(3)))
    assert f"cpo@2 is waiting: 16 groups are missing: run `cpo-pipe rank tiny.yaml {options}`" in first.err
    ok(project.cli("rank", "tiny.yaml", *iterations(3)))
    result = ok(project.cli("generate-negatives", "tiny.yaml", *iterations(3)))
    assert waiting in result.err
    assert waiting.replace("cpo@2", "cpo@3", 1) in result.err
    assert len(hashes(project, "negatives")) == 1

    needed = f"48 negatives of cpo@2 are missing: run `cpo-pipe generate-negatives tiny.yaml {options}`"
    result = ok(project.cli("train", "tiny.yaml", *iterations(3)))
    assert result.out.splitlines() == [f"cpo@2 is waiting: {needed}", f"cpo@3 is waiting: {needed}"]
    assert refused("train", "tiny.yaml", "cpo@2") == f"error: {needed}"

    ok(project.cli("generate-negatives", "tiny.yaml", *iterations(3)))
    assert len(hashes(project, "negatives")) == 2
    assert refused("train", "tiny.yaml", "cpo@2") == (
        f"error: 16 groups of cpo@2 are missing: run `cpo-pipe rank tiny.yaml {options}`"
    )
    ok(project.cli("rank", "tiny.yaml", *iterations(3)))
    ok(project.cli("train", "tiny.yaml", "cpo@2", *iterations(3)))
    assert refused("evaluate", "tiny.yaml", *LATEST).startswith(
        "error: 48 negatives of cpo@3 are missing: run `cpo-pipe"
    )
    assert refused("train", "tiny.yaml", "cpo@4") == ("error: training cpo@4: not in the recipe; did you mean cpo@3?")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["negatives", "training"])
def test_a_run_that_is_stopped_between_iterations_goes_on(made, monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    from cpo_pipe import run

    stage = {"negatives": "generate_negatives", "training": "train"}[stopped]
    whole, done = getattr(run, stage), []

    def interrupted(*arguments: Any) -> Any:
        done.append(arguments)
        if len(done) == {"negatives": 2, "training": 3}[stopped]:  # the first of round 2
            signal.raise_signal(signal.SIGTERM)
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, stage, interrupted)
        assert made.cli("run", "tiny.yaml", *iterations(2)).status == 130
    assert "train cpo@2" not in {name for name, stage in stages(made).items() if "started" in stage}
    kept = made.made()
    ok(made.cli("run", "tiny.yaml", *iterations(2)))
    now = made.made()
    assert {path: now.get(path) for path in kept} == kept
    assert spec(made, "cpo@2")["reference"] == fingerprint(made, "cpo")
    assert len(hashes(made, "checkpoints")) == 3


@pytest.mark.slow
def test_chains_do_not_mix_and_without_a_reference_only_the_start_is_replaced(made) -> None:
    """Two trainings on the same first negatives: from round 2 on each learns from its own model's."""
    options = ("--set", "train.slic={init: start, objective: slic, max_steps: 2, batch_size: 4, learning_rate: 0.01}",
               *iterations(2),
               "--set", "train.tuned={init: slic@2, objective: mle, max_steps: 1, batch_size: 4}")  # fmt: skip
    ok(made.cli("run", "tiny.yaml", *options))
    assert len(hashes(made, "negatives")) == 3
    for name in ("cpo", "slic"):
        (artifact,) = stages(made)[f"generate-negatives of {name}@2"]["artifact"]
        assert {row["generator"] for row in rows(made, artifact)} == {fingerprint(made, name)}
        assert spec(made, f"{name}@2")["init"] == {"model": fingerprint(made, name)}
    assert spec(made, "slic@2")["reference"] is None
    assert spec(made, "tuned")["init"] == {"model": fingerprint(made, "slic@2")}
    assert "train tuned@2" not in stages(made)


@pytest.mark.slow
def test_negatives_that_no_model_writes_are_the_same_in_each_iteration(made) -> None:
    options = ("--set", "negatives.sources={batch: {count: 1}, truncation: {count: 1}}", *iterations(2))
    ok(made.cli("run", "tiny.yaml", *options))
    done = stages(made)
    assert done["rank of cpo@2"]["artifact"] == done["rank"]["artifact"]
    assert spec(made, "cpo@2")["reference"] == fingerprint(made, "cpo") != fingerprint(made, "start")
