"""Trainings of one recipe on different negatives, as the paper's tables compare them."""

import json

import pyarrow.parquet as pq
import pytest

from tests.support.project import Project

BASE = "{init: start, reference: start, objective: cpo, max_steps: 1, batch_size: 2, beta: 0.1}"
TRAININGS = [
    "negatives.sources.batch={count: 1}", "negatives.sources.truncation={count: 2}",
    "train.cpo.negatives={autoregressive: 2}",
    f"train.an={BASE}", "train.an.negatives={autoregressive: 3}",
    f"train.mix={BASE}", "train.mix.negatives={batch: 1, truncation: 2}",
]  # fmt: skip


def settings(*more: str) -> list[str]:
    return [part for value in (*TRAININGS, *more) for part in ("--set", value)]


def spec_of(project: Project, training: str) -> dict[str, object]:
    run = json.loads((project.root / "runs" / "tiny" / "latest" / "run.json").read_text())
    folder = project.store / run["stages"][f"train {training}"]["artifact"]
    spec: dict[str, object] = json.loads((folder / "spec.json").read_text())
    return spec


def strategies(project: Project, training: str) -> list[tuple[str, int]]:
    groups = spec_of(project, training)["groups"]
    assert isinstance(groups, dict)
    return [(source["negatives"]["strategy"], source["count"]) for source in groups["candidates"]]


@pytest.mark.slow
def test_each_training_has_the_negatives_that_it_names(project: Project) -> None:
    done = project.cli("run", "tiny.yaml", *settings("evaluate.systems.mix={model: mix}"))
    assert done.status == 0, done.err
    assert strategies(project, "cpo") == [("autoregressive", 2)]
    assert strategies(project, "an") == [("autoregressive", 3)]
    assert strategies(project, "mix") == [("batch", 1), ("truncation", 2)]
    # The samples of both are one artifact: three of each example, made once.
    rows = pq.read_table(sorted(project.store.glob("negatives/*/shards/*.parquet"))[:100])
    sampled = [row for row in rows.to_pylist() if row["strategy"] == "autoregressive"]
    keys = {(row["example_id"], row["sample_index"]) for row in sampled}
    assert len(keys) == len(sampled) == 3 * len({row["example_id"] for row in sampled})
    report = (project.root / "runs" / "tiny" / "latest" / "report.html").read_text()
    assert "negatives of mix" in report

    made = project.made()
    again = project.cli("run", "tiny.yaml", *settings("evaluate.systems.mix={model: mix}"))
    assert again.status == 0, again.err
    assert project.made() == made
    # Another choice is another training, of the same start.
    other = project.cli("run", "tiny.yaml", *settings("train.mix.negatives={truncation: 1}"))
    assert other.status == 0, other.err
    assert strategies(project, "mix") == [("truncation", 1)]


@pytest.mark.slow
def test_stages_do_what_all_trainings_want_and_only_that(project: Project) -> None:
    own = "train.cpo.negatives={truncation: 1}"
    for stage in ("prepare", "train", "generate-negatives", "rank", "train"):
        names = ["start"] if stage == "train" and not project.store.joinpath("negatives").exists() else []
        done = project.cli(stage, "tiny.yaml", *names, *settings(own))
        assert done.status == 0, done.err
    stages = json.loads((project.root / "runs" / "tiny" / "latest" / "run.json").read_text())["stages"]
    assert {name for name in stages if name.startswith("rank")} == {"rank of cpo", "rank of an", "rank of mix"}
    assert project.cli("quality", "tiny.yaml", *settings(own)).status == 0
    out = project.root / "pairs"
    done = project.cli("export", "tiny.yaml", *settings(own), "--training", "mix", "--out", str(out))
    assert done.status == 0, done.err
    rejected = pq.read_table(sorted(out.rglob("*.parquet")))["rejected_strategy"].to_pylist()
    assert set(rejected) <= {"batch", "truncation"}
    wrong = project.cli("export", "tiny.yaml", *settings(own), "--training", "mixx", "--out", str(project.root / "p2"))
    assert (wrong.status, wrong.error()) == (2, "error: --training mixx: no training on negatives; did you mean mix?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.an.negatives={autoregresive: 1}", "unknown source 'autoregresive'; did you mean autoregressive?"),
        ("train.an.negatives={x: 1}", "train.an.negatives: unknown source 'x'; choose from autoregressive, batch"),
        ("train.an.negatives={batch: 0}", "train.an.negatives.batch is 0: input should be greater than 0"),
        (
            "train.start.negatives={batch: 1}",
            'train.start.negatives: not used by objective "mle" (but by cpo, cpo-ranked,',
        ),
        ("train.an.negatives={batch: 100000}", "train.an.negatives.batch: Input should be less than 65536"),
        (
            "train.mix.pairs=[[truncation, truncation]]",
            "train.mix: pairs [truncation, truncation]: chosen and rejected must",
        ),
        ("train.mix.pairs=[[target, batch], [batch, target]]", "pairs [batch, target]: duplicate pair"),
        (
            "train.mix.curriculum={by: strength, order: continuous}",
            "train.mix.curriculum.by is strength, but target has none; set negatives.target_strength",
        ),
        (
            "train.mix.curriculum={by: margin, stages: 3}",
            "train.mix: max_steps is 1, but curriculum.stages is 3: the hardest",
        ),
        ("train.mix.pairs=[[target, autoregressive]]", "train.mix.pairs: unknown label 'autoregressive'; choose"),
    ],
)
def test_what_is_not_there_is_refused(project: Project, change: str, message: str) -> None:
    found = project.cli("train", "tiny.yaml", *settings(change))
    assert found.status == 2
    assert message in found.error()


def test_strengths_are_needed_of_what_is_compared_only(project: Project) -> None:
    pairs = "train.mix.pairs=[[batch, truncation], [target, truncation]]"
    found = project.cli(
        "train", "tiny.yaml", *settings(pairs, "train.mix.curriculum={by: strength, order: continuous}")
    )
    assert found.status == 2
    assert (
        "train.mix.curriculum.by is strength, but batch has none; set negatives.sources.batch.strength" in found.error()
    )


@pytest.mark.slow
def test_pools_that_are_models_and_the_hardest_batch_negatives_may_be_one_trainings_own(project: Project) -> None:
    """What a training leaves out must not make the rest of the section look wrong."""
    own = [
        "negatives.sources.batch={count: 2, hard_negatives_from: 4}", "negatives.sources.truncation.count=1",
        "negatives.sources.self={strategy: pool, model: start, strength: 1}",
        "train.cpo.negatives={self: 1}", "train.an.negatives={batch: 1}", "train.mix.negatives={truncation: 1}",
    ]  # fmt: skip
    done = project.cli("run", "tiny.yaml", *settings(*own))
    assert done.status == 0, done.err
    (pool,) = spec_of(project, "cpo")["groups"]["candidates"]  # type: ignore[index]
    assert (pool["label"], pool["count"]) == ("self", 1)
    assert strategies(project, "an") == [("batch", 1)]
    assert strategies(project, "mix") == [("truncation", 1)]


def test_a_generator_may_learn_from_negatives_that_no_model_writes(project: Project) -> None:
    own = ["negatives.sources.autoregressive.model=mix", "train.an.init=mix"]
    found = project.cli("train", "tiny.yaml", "nothing", *settings(*own))
    assert "training nothing: not in the recipe" in found.error(), "and no cycle"
