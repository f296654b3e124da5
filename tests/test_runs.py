"""Run folders: a version of a recipe each; the list of runs, comparisons and sweeps."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from scipy import stats

from cpo_pipe.compare import compare
from cpo_pipe.data.progress import duration_text
from cpo_pipe.eval.metrics.figures import VALUES
from cpo_pipe.eval.statistics.paired import paired_differences
from cpo_pipe.recipe.load import load_recipe
from cpo_pipe.runs import RunFolder, all_runs, find_run, run_folder
from cpo_pipe.sweep import combinations
from tests.support.project import Project

CHANGED = ["--set", "train.cpo.beta=0.5"]


def test_a_version_of_a_recipe_has_one_folder(made: Project) -> None:
    before = made.run_dir
    report = (before / "report.html").read_bytes()
    assert made.cli("run", "tiny.yaml", *CHANGED).status == 0
    after = made.run_dir
    assert re.fullmatch(r"\d{8}-\d{4}-[0-9a-f]{6}", after.name)
    assert after != before
    assert (before / "report.html").read_bytes() == report, "an earlier report stays"
    assert made.cli("run", "tiny.yaml").status == 0
    assert made.run_dir == before, "an unchanged recipe goes on in its folder, to which latest leads"
    assert (made.root / "runs/tiny/latest").is_symlink()
    assert made.cli("evaluate", "tiny.yaml", "--run-dir", "mine").status == 0
    assert (made.root / "mine/report.html").is_file()
    assert not (made.root / "latest").exists()


def test_the_folder_is_that_of_the_text(tmp_path: Path) -> None:
    first = run_folder("a", "text", tmp_path)
    assert first.parent == tmp_path / "a"
    old = tmp_path / "a" / f"20200101-0000-{first.name[-6:]}"
    old.mkdir(parents=True)
    assert run_folder("a", "text", tmp_path) == old
    assert run_folder("a", "other", tmp_path).name[-6:] != first.name[-6:]
    assert run_folder("b", "text", tmp_path).parent == tmp_path / "b"


def test_runs_are_listed_with_what_changed(made: Project) -> None:
    first = made.run_dir
    assert made.cli("run", "tiny.yaml", *CHANGED, "--set", "evaluate.bootstrap=60").status == 0
    assert made.cli("prepare", "tiny.yaml", "--set", "name=other").status == 0
    head, *lines = made.cli("runs").out.splitlines()
    assert head.split() == ["RUN", "LAST", "STARTED", "TOOK", "WHAT"]
    assert [line.split()[0] for line in lines] == [run.label for run in all_runs(made.root / "runs")]
    assert len(lines) == 3
    assert "no stage is done" not in lines[0]
    assert "not evaluated; last stage: prepare" in lines[0], "runs/other"
    plain, changed = lines[1:] if str(first.name) in lines[1] else lines[:0:-1]
    assert "exact win rate of cpo under greedy" in plain
    assert "train.cpo.beta" in changed
    assert "evaluate.bootstrap" in changed
    assert len(made.cli("runs", "tiny").out.splitlines()) == 3
    assert "did you mean tiny?" in made.cli("runs", "tiney").error()


def test_a_run_is_found_by_name_version_or_folder(made: Project) -> None:
    folder = made.run_dir
    for text in ("tiny", f"tiny/{folder.name}", f"runs/tiny/{folder.name}", folder.name[-6:], str(folder)):
        assert find_run(text).path.resolve() == folder, text
    assert "did you mean tiny?" in made.cli("compare", "tny", "tiny").error()
    assert "names one run; name another" in made.cli("compare", "tiny").error()


def test_compare_shows_keys_artifacts_and_metrics(made: Project) -> None:
    first = made.run_dir
    assert made.cli("run", "tiny.yaml", "--set", "train.cpo.learning_rate=0.05").status == 0
    result = made.cli("compare", first.name, "tiny", "--html", "page.html")
    assert result.status == 0, result.err
    assert re.search(r"train\.cpo\.learning_rate +0\.01 +0\.05", result.out)
    assert re.search(r"train cpo +checkpoints/\w+ +checkpoints/\w+", result.out)
    assert "train start" not in result.out, "what is the same in both is left out"
    assert "cpo, -: target NLL" in result.out
    assert max(map(len, result.out.splitlines())) <= 120
    page = (made.root / "page.html").read_text()
    assert "train.cpo.learning_rate" in page
    assert "<script" not in page
    both = [RunFolder(first), RunFolder(made.run_dir)]
    found = compare(both)
    nll = next(row for row in found.metrics if (row.system, row.metric) == ("cpo", "target NLL"))
    assert nll.values == [
        run.metrics()["cpo", "-", "target NLL"] for run in (RunFolder(first), RunFolder(made.run_dir))
    ]
    assert nll.differences[0] is not None
    assert nll.differences[0].value == pytest.approx(nll.values[1] - nll.values[0])  # type: ignore[operator]
    assert nll.differences[0].n == 4


def test_a_comparison_with_itself_has_no_difference(made: Project) -> None:
    found = compare([RunFolder(made.run_dir)] * 2)
    assert (found.keys, found.artifacts, found.metrics, found.notes) == ([], [], [], [])


def values(system: str, metric: str, of: dict[str, float]) -> pa.Table:
    rows = [{"example_id": key, "system": system, "decoding": "d", "metric": metric, "value": value}
            for key, value in of.items()]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=VALUES)


def test_differences_are_paired_by_example_and_adjusted() -> None:
    random = np.random.default_rng(0)
    level = random.normal(size=60) * 5  # far more than the gain, and the same in both runs
    one = {f"e{i}": float(level[i]) for i in range(60)}
    two = {f"e{i}": float(level[i] + 0.2 + random.normal() * 0.3) for i in reversed(range(10, 60))}
    noise = ({f"e{i}": float(random.normal()) for i in range(60)} for _ in range(2))
    first, second = [
        pa.concat_tables([values("s", "m", a), values("s", "noise", b)]) for a, b in zip((one, two), noise, strict=True)
    ]
    means = [{("s", "d", "m"): float(np.mean(list(of.values()))), ("s", "d", "noise"): 0.0, ("s", "d", "whole"): 1.0}
             for of in (one, two)]  # fmt: skip
    found = paired_differences(*means, first, second)
    gain = found["s", "d", "m"]
    gains = [two[key] - one[key] for key in two]
    assert gain.n == 50
    assert gain.value == pytest.approx(np.mean(gains)), "over the examples that both have"
    assert gain.p == pytest.approx(2 * stats.ttest_1samp(gains, 0).pvalue, abs=0.002), "two metrics were tested"
    assert gain.significant
    assert not found["s", "d", "noise"].significant
    assert (found["s", "d", "whole"].value, found["s", "d", "whole"].p) == (0, None), "no values per example"


# ── sweeps ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_combinations_in_order() -> None:
    assert combinations({"a.b": [1, "x: y"], "c": [[1], None]}) == [
        ["a.b=1", "c=[1]"], ["a.b=1", "c=null"], ["a.b='x: y'", "c=[1]"], ["a.b='x: y'", "c=null"],
    ]  # fmt: skip
    assert combinations({"note": ["two\nlines"]}) == [[r'note="two\nlines"']], "a command line shows it"
    (small,) = combinations({"train.cpo.learning_rate": [1e-05]})
    (setting,) = (one.replace("cpo", "cpo-ranked") for one in small)
    assert load_recipe("demo", [setting]).train["cpo-ranked"].learning_rate == 1e-5


@pytest.mark.slow
def test_a_sweep_makes_once_what_its_runs_share(project: Project) -> None:
    sweep = ["--set", "sweep={train.cpo.beta: [0.1, 0.5, 1.0, 5.0]}"]
    result = project.cli("run", "tiny.yaml", *sweep)
    assert result.status == 0, result.err
    made = {
        kind: len([*project.store.glob(f"{kind}/*/manifest.json")]) for kind in ("examples", "checkpoints", "metrics")
    }
    assert made == {"examples": 1, "checkpoints": 1 + 4, "metrics": 4}
    assert len([*project.store.glob("negatives/*")]) == len([*project.store.glob("groups/*")]) == 1
    assert len([*project.store.glob("generations/*")]) == 1 + 4
    runs = [*all_runs(project.root / "runs")]
    assert sorted(run.recipe["train"]["cpo"]["beta"] for run in runs) == [0.1, 0.5, 1.0, 5.0]
    assert {run.recipe["evaluate"]["split"] for run in runs} == {"validation"}
    assert "combination 4/4: train.cpo.beta=5.0" in result.out
    table = result.out[result.out.index("COMBINATION") :].splitlines()
    gains = [float(line.split()[3]) for line in table[1:5]]
    assert gains == sorted(gains, reverse=True)
    best = table[1].split()[0]
    assert table[5].endswith(f"cpo-pipe run tiny.yaml --set '{sweep[1]}' --set 'sweep={{}}' --set {best}")
    again = project.cli("run", "tiny.yaml", *sweep)
    assert again.out[again.out.index("COMBINATION") :].splitlines() == table, "a second call makes nothing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sweep={train.cpo.bta: [1]}"], "train.cpo.bta is not a known key; did you mean beta?"),
        (["sweep={train.cpo.beta: []}"], "sweep.train.cpo.beta is []: list should have at least 1 item"),
        (["sweep={train.cpo.beta: [1, -1]}"], "train.cpo.beta is -1: input should be greater than 0"),
        (["sweep={train.cpo.beta: [1]}", "data.validation=0"], "sweep: ranks on validation rows, but data.validation"),
        (["sweep={train.cpo.beta: [1]}", "evaluate=null"], "sweep: needs the section evaluate"),
    ],
)
def test_a_sweep_is_checked_before_its_first_run(project: Project, settings: list[str], message: str) -> None:
    result = project.cli("run", "tiny.yaml", *(part for one in settings for part in ("--set", one)))
    assert result.status == 2
    assert message in result.error()
    assert project.cli("check", "tiny.yaml", *(part for one in settings for part in ("--set", one))).status == 2
    assert not project.store.exists() or not [*project.store.glob("examples/*")]


def test_stages_do_not_take_a_sweep(project: Project) -> None:
    sweep = ["--set", "sweep={train.cpo.beta: [0.1]}"]
    assert "sweep: only `run` and `check` use it" in project.cli("train", "tiny.yaml", *sweep).error()
    assert project.cli("check", "tiny.yaml", *sweep).status == 0


def test_durations() -> None:
    assert [duration_text(seconds) for seconds in (4.4, 75, 3600, 7325)] == [
        "4 s",
        "1 min 15 s",
        "1 h 0 min",
        "2 h 2 min",
    ]


def test_a_damaged_record_is_a_run_without_stages(made: Project) -> None:
    (made.run_dir / "run.json").write_text("{")
    (made.run_dir / "recipe.yaml").write_text("{")
    assert made.cli("runs").status == 0
    assert json.loads("{}") == RunFolder(made.run_dir).recipe


def test_a_section_that_one_of_three_runs_lacks(made: Project) -> None:
    recipes = [{"a": {"x": 1, "y": 2}}, {}, {"a": {"x": 1, "y": 3}}]
    for number, recipe in enumerate(recipes):
        folder = made.root / str(number)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
    found = compare([RunFolder(made.root / str(number)) for number in range(3)])
    assert found.keys == [("a.x", ["1", "not set", "1"]), ("a.y", ["2", "not set", "3"])]


def test_many_metrics_can_be_significant() -> None:
    random = np.random.default_rng(0)
    each = [{f"e{i}": float(value) for i, value in enumerate(random.normal(size=100))} for _ in range(300)]
    first = pa.concat_tables([values("s", str(n), one) for n, one in enumerate(each)])
    gained = [{key: value + 1 + float(random.normal()) * 0.1 for key, value in one.items()} for one in each]
    second = pa.concat_tables([values("s", str(n), one) for n, one in enumerate(gained)])
    means = [
        {("s", "d", str(n)): float(np.mean(list(one.values()))) for n, one in enumerate(of)} for of in (each, gained)
    ]
    assert all(one.significant for one in paired_differences(*means, first, second).values())


def test_only_common_examples_are_compared() -> None:
    one = {f"e{i}": float(i) for i in range(60)}
    two = {f"e{i}": float(i) + 1 + i % 2 for i in range(40)}
    means = [{("s", "d", "m"): float(np.mean(list(of.values())))} for of in (one, two)]
    found = paired_differences(*means, values("s", "m", one), values("s", "m", two))["s", "d", "m"]
    assert (found.value, found.n) == (1.5, 40)


def test_a_folder_in_the_place_of_latest_is_named(project: Project) -> None:
    (project.root / "runs/tiny/latest").mkdir(parents=True)
    assert "runs/tiny/latest: is no link" in project.cli("prepare", "tiny.yaml").error()
    assert "is a folder; name a file" in project.cli("compare", "a", "b", "--html", ".").error()


def test_a_recipe_without_trainings_compares_models(made: Project) -> None:
    """The section `train` can be left out where all models are folders."""
    content = yaml.safe_load((made.root / "tiny.yaml").read_text())
    cpo = json.loads((made.run_dir / "run.json").read_text())["stages"]["train cpo"]["artifact"]
    models = {"start": {"model": str(made.model)}, "cpo": {"model": f"cpo-store/{cpo}"}}
    only = {"name": "only", "data": content["data"], "evaluate": content["evaluate"] | {"systems": models}}
    made.write("only.yaml", yaml.safe_dump(only))
    result = made.cli("run", "only.yaml")
    assert result.status == 0, result.err
    stages = json.loads((made.root / "runs/only/latest/run.json").read_text())["stages"]
    assert list(stages) == ["prepare", "evaluate"]
    result = made.cli("train", "only.yaml")
    assert result.status == 2
    assert "train: the recipe has no such section, so there is nothing to train; add it" in result.error()
