"""`cpo-pipe plan`: what exists, what would be made and why, and what it takes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.amounts import StagePlan
from cpo_pipe.probe import extrapolate, small
from cpo_pipe.recipe.load import load_recipe
from cpo_pipe.run import Run
from cpo_pipe.runs import run_folder
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from tests.support.api_server import serve, written
from tests.support.project import Project


def planned(project: Project, *options: str) -> dict[str, dict[str, Any]]:
    result = project.cli("plan", "tiny.yaml", "--json", *options)
    assert result.status == 0, result.err
    return {stage["stage"]: stage for stage in json.loads(result.out)}


def test_a_new_recipe_makes_everything(project: Project) -> None:
    stages = planned(project, "--no-probe")
    assert [(name, stage["state"], stage["amount"], stage["unit"]) for name, stage in stages.items()] == [
        ("prepare", "exists", 24, "examples"),
        ("train start", "make", 2, "steps"),
        ("generate-negatives", "make", 48, "samples"),
        ("rank", "make", 16, "groups"),
        ("train cpo", "make", 2, "steps"),
        ("evaluate", "make", 8, "outputs"),
    ]
    assert stages["train start"]["why"] == "the store has no checkpoints"
    assert stages["rank"]["why"] == "waits: the training start is not done"
    assert stages["evaluate"]["why"] == "waits for start, cpo"
    assert stages["evaluate"]["tokens"] == 8 * 8
    assert {stage["seconds"] for stage in stages.values()} == {None}
    assert not [*project.store.glob("checkpoints/*")]
    assert not (project.root / "runs").exists(), "a plan is no run"


def test_a_finished_recipe_makes_nothing(made: Project) -> None:
    result = made.cli("plan", "tiny.yaml")
    assert {stage["state"] for stage in planned(made).values()} == {"exists"}
    assert result.out.splitlines()[-1] == "nothing to make"


def test_a_changed_key_is_named(made: Project) -> None:
    stages = planned(made, "--no-probe", "--set", "train.cpo.beta=0.5", "--set", "evaluate.bootstrap=60")
    assert {name for name, stage in stages.items() if stage["state"] == "make"} == {"train cpo", "evaluate"}
    assert stages["train cpo"]["why"].startswith("differs from checkpoints/")
    assert stages["train cpo"]["why"].endswith(" in settings.beta: 0.1 → 0.5")
    assert stages["evaluate"]["why"] == "waits for cpo"
    assert stages["evaluate"]["amount"] == 4, "the outputs of start exist"
    more = planned(made, "--no-probe", "--set", "negatives.sources.autoregressive.count=5")
    assert more["generate-negatives"]["why"] == "48 of 80 exist"
    assert more["generate-negatives"]["amount"] == 32
    only = planned(made, "--no-probe", "--set", "evaluate.bootstrap=60")
    assert only["evaluate"]["why"].endswith("in bootstrap: 50 → 60")
    assert only["evaluate"]["amount"] == 0, "all outputs exist"


@pytest.mark.slow
def test_the_probe_measures_and_leaves_nothing(project: Project) -> None:
    stages = planned(project)
    assert all(stage["seconds"] > 0 and stage["memory"] > 1e8 for stage in [*stages.values()][1:])
    assert {path.name for path in project.store.iterdir()} <= {"examples", "file-hashes.json", ".locks", ".runs"}
    lines = project.cli("plan", "tiny.yaml").out.splitlines()
    assert lines[-1].startswith("total: time ")
    assert "peak memory" in lines[-1]
    result = project.cli("run", "tiny.yaml")
    assert result.status == 0
    record = json.loads((project.run_dir / "run.json").read_text())["stages"]
    parts = {part["label"]: (part["done"], part["unit"]) for part in record["train cpo"]["work"]}
    assert parts == {"train cpo": (2, "steps"), "log-probs of start": (16, "groups")}
    for name, stage in list(stages.items())[1:]:
        assert stage["memory"] == pytest.approx(record[name]["peak"]["memory"], rel=0.2), name


def test_what_the_probe_took_is_multiplied(made: Project) -> None:
    recipe = load_recipe("tiny.yaml", ["train.cpo.max_steps=400", "train.cpo.batch_size=16", "data.train=16"])
    run = Run(recipe, "tiny.yaml", *_places(made))
    tiny = small(run)
    assert (tiny.train["cpo"].max_steps, tiny.train["cpo"].batch_size) == (4, 16)
    probe = Run(load_recipe("tiny.yaml", ["negatives.max_examples=4", "evaluate.examples=2"]), "x", *_places(made))
    rank = StagePlan("rank", "make")
    measured = {"seconds": 5.0, "work": [{"label": "rank", "unit": "groups", "done": 4, "seconds": 2.0}], "peak": {}}
    extrapolate(run, probe, rank, measured)
    assert rank.seconds == pytest.approx(3 + 2 * 16 / 4)
    outputs = StagePlan("evaluate", "make")
    work = [{"label": "evaluate cpo", "unit": "samples", "done": 2, "seconds": 1.0}]
    extrapolate(run, probe, outputs, {"seconds": 1.5, "work": work, "peak": {"memory": 7, "gpu_memory": 9}})
    assert outputs.seconds == pytest.approx(0.5 + 1.0 * 4 / 2)
    assert outputs.memory == 9
    half = StagePlan("evaluate", "make", share=0.5)
    work.append({"label": "judge exact", "unit": "pairs", "done": 2, "seconds": 3.0})
    extrapolate(run, probe, half, {"seconds": 4.5, "work": work, "peak": {}})
    assert half.seconds == pytest.approx(0.5 + 1.0 * 0.5 * 4 / 2 + 3.0 * 4 / 2), "outputs that exist are judged, too"


def test_steps_and_measurements_of_a_training_are_multiplied_apart(tmp_path: Path) -> None:
    pq.write_table(pa.table({"seconds": [5.0, 1.0, 2.0, 3.0, 4.0]}), tmp_path / METRICS_FILE)
    asked = SimpleNamespace(batch_size=8, max_steps=250, eval_steps=100, validation=24)
    small = SimpleNamespace(batch_size=4)
    run = SimpleNamespace(resolver=SimpleNamespace(trainings={"a": asked}))
    probe = SimpleNamespace(
        resolver=SimpleNamespace(trainings={"a": small}, model=lambda name: SimpleNamespace(path=tmp_path))
    )
    # A step of 8 takes twice the 2 s of one of 4. Four measurements (0, 100, 200, 250) take the 4 s of the last row and
    # a third of the 3 steps that 24 validation groups are.
    measured = {"seconds": 16.0, "work": [{"label": "train a", "unit": "steps", "done": 4, "seconds": 15.0}]}
    stage = StagePlan("train a", "make")
    extrapolate(run, probe, stage, measured)  # type: ignore[arg-type]
    assert stage.seconds == pytest.approx(1 + 250 * 4 + 4 * (4 + 24 / 8 * 4 / 3))


def _places(project: Project) -> tuple[Any, Any]:
    from cpo_pipe.data.store import Store

    return Store("cpo-store"), run_folder("tiny", "x", project.root / "runs")


@pytest.mark.slow
def test_apis_are_counted_and_not_asked(project: Project) -> None:
    pytest.importorskip("openai")
    with serve(lambda seen: written(seen, "A")) as server:
        api = f"apis.mini={{url: '{server.url}', model: m, input_price: 1, output_price: 2}}"
        judge = ["--set", api, "--set", "evaluate.judges={taste: {kind: openai, api: mini}}"]
        stages = planned(project, *judge)
        assert stages["evaluate"]["calls"] == 8
        assert stages["evaluate"]["usd"] > 0
        assert stages["train cpo"]["seconds"] > 0
        source = ["--set", api, "--set", "negatives.sources.p={strategy: pool, model: mini}"]
        result = project.cli("plan", "tiny.yaml", *source)
        assert "no probe, since it would ask APIs (mini): time and memory are not known" in result.err
        assert server.seen == []


@pytest.mark.slow
def test_later_iterations_are_planned_like_the_first(project: Project) -> None:
    stages = planned(project, "--set", "iterations=2", "--set", "evaluate.systems.two={model: cpo@2}")
    made = [name for name, stage in stages.items() if stage["state"] == "make"]
    assert {"generate-negatives of cpo@2", "rank of cpo@2", "train cpo@2"} < {*made}
    assert all(stages[name]["seconds"] > 0 for name in made)


def test_a_plan_reports_all_mistakes(project: Project) -> None:
    result = project.cli("plan", "tiny.yaml", "--set", "train.cpo.report_to=[wandb]", "--set", "data.source=no.jsonl")
    assert result.status == 2
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 2


def test_samples_that_trainings_share_are_counted_once(project: Project) -> None:
    """cpo takes three of a source, two takes five of the same: two more."""
    training = "{init: start, objective: dpo, reference: start, max_steps: 2, batch_size: 4, negatives: {%s: %d}}"
    options = ["--no-probe", "--set", "negatives.sources.autoregressive.count=5"]
    for name, count in {"three": 3, "five": 5, "one": 1}.items():
        options += ["--set", f"train.{name}={training % ('autoregressive', count)}"]
    stages = planned(project, *options, "--set", "train.cpo.negatives={autoregressive: 3}")
    made = {name: stage["amount"] for name, stage in stages.items() if name.startswith("generate-negatives")}
    assert sorted(made.values()) == [0, 0, 16 * 2, 16 * 3]
    assert sum(stage["why"] == "an earlier stage makes them" for stage in stages.values()) == 2


def test_negatives_from_an_api_are_counted(project: Project) -> None:
    pytest.importorskip("openai")
    with serve(lambda seen: written(seen, "A")) as server:
        api = f"apis.mini={{url: '{server.url}', model: m, input_price: 1000, output_price: 1000}}"
        source = "negatives.sources={p: {strategy: pool, model: mini, count: 2}}"
        found = planned(project, "--set", api, "--set", source)["generate-negatives"]
    assert found["calls"] == 16 * 2
    assert found["usd"] > 0


@pytest.mark.slow
def test_what_a_killed_probe_left_is_removed(project: Project) -> None:
    left = project.store / ".plan-999999999"
    left.mkdir(parents=True)
    planned(project)
    assert not left.exists()
