"""What a run leaves in its folder: the resolved recipe, the report, and the tables beside it."""

import json
import re
import signal
import statistics

import pyarrow.parquet as pq
import pytest
import yaml

from cpo_pipe.recipe.load import load_recipe
from tests.support.api_server import serve
from tests.support.project import figures, stages


def test_the_run_folder_has_the_recipe_of_the_last_successful_stage(made) -> None:
    resolved = made.run_dir / "recipe.yaml"
    before = resolved.read_text()
    assert "\nname: tiny\n" in before
    assert made.cli("prepare", "tiny.yaml", "--set", "data.source=absent.jsonl").status == 2
    assert made.cli("evaluate", "tiny.yaml", "--set", "train.cpo.beta=0.3").status == 2  # not trained
    assert resolved.read_text() == before
    assert made.cli("train", "tiny.yaml", "cpo", "--set", "train.cpo.beta=0.3").status == 0
    assert resolved.read_text() == before, "a changed recipe has a folder of its own"
    assert load_recipe(str(made.run_dir / "recipe.yaml")).train["cpo"].beta == 0.3


def shown_artifacts(project) -> dict[str, str]:
    html = (project.root / "runs/tiny/latest/report.html").read_text()
    return dict(re.findall(r"<dt>([^<]*)</dt><dd><code>([^<]*)</code></dd>", html))


def test_the_report_lists_the_artifacts_of_its_own_recipe(made) -> None:
    """Artifacts that another recipe made in the same folder are not listed."""
    before = shown_artifacts(made)
    kinds = {name: place.split("/")[0] for name, place in before.items()}
    checkpoints = dict.fromkeys(("training start", "training cpo", "system start", "system cpo"), "checkpoints")
    assert kinds == {"examples": "examples", "negatives": "negatives", "groups": "groups", "metrics": "metrics",
                     **checkpoints}  # fmt: skip
    assert all((made.store / place).is_dir() for place in before.values())
    assert before["training cpo"] == before["system cpo"] != before["system start"]
    fewer = ["--set", "negatives.sources.autoregressive.count=2", "--set", "negatives.seed=1"]
    assert made.cli("generate-negatives", "tiny.yaml", *fewer).status == 0
    assert made.cli("rank", "tiny.yaml", *fewer).status == 0
    assert made.cli("evaluate", "tiny.yaml").status == 0
    assert shown_artifacts(made) == before
    recipe = yaml.safe_load((made.root / "tiny.yaml").read_text())
    del recipe["train"]["cpo"], recipe["negatives"], recipe["evaluate"]["systems"]["cpo"]
    recipe["evaluate"]["systems"]["raw"] = {"model": str(made.model)}
    made.write("alone.yaml", yaml.safe_dump(recipe))
    assert made.cli("run", "alone.yaml").status == 0
    alone = shown_artifacts(made)
    assert sorted(alone) == ["examples", "metrics", "system raw", "system start", "training start"]
    assert alone["system raw"].startswith(f"{made.model} (")


def test_the_report_says_why_it_shows_no_negatives(made) -> None:
    recipe = yaml.safe_load((made.root / "tiny.yaml").read_text())
    del recipe["train"]["cpo"], recipe["evaluate"]["systems"]["cpo"]
    made.write("tiny.yaml", yaml.safe_dump(recipe))
    assert made.cli("evaluate", "tiny.yaml", "--set", "negatives.seed=1").status == 0
    html = (made.root / "runs/tiny/latest/report.html").read_text()
    assert "No negatives are shown: 48 negatives are missing: run `cpo-pipe generate-negatives tiny.yaml" in html
    assert made.cli("evaluate", "tiny.yaml").status == 0
    html = (made.root / "runs/tiny/latest/report.html").read_text()
    assert "No negatives are shown" not in html
    assert "autoregressive" in html
    # Bad input is not reported as missing input.
    result = made.cli("evaluate", "tiny.yaml", "--set", "negatives.sources.autoregressive.max_new_tokens=127")
    assert result.status == 2
    assert "negatives.sources.autoregressive.max_new_tokens is 127" in result.error()


def test_the_report_shows_the_similarities_of_the_negatives(made) -> None:
    assert made.cli("run", "tiny.yaml", "--set", "rank={}").status == 0
    html = (made.root / "runs/tiny/latest/report.html").read_text()
    (groups,) = (path for path in made.store.glob("groups/*") if json.loads((path / "spec.json").read_text())["scorer"])
    rows = [row for shard in groups.glob("shards/*.parquet") for row in pq.read_table(shard).to_pylist()]
    cosines = [candidate["similarity"] for row in rows for candidate in row["candidates"][1:]]
    assert len(cosines) > 16
    assert f"{len(cosines)} negatives, median {statistics.median(cosines):.2f}" in html


@pytest.mark.slow
def test_the_report_says_which_stage_was_not_finished(made, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_pipe.pipeline.engines.transformers import TransformersEngine

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", lambda *_: signal.raise_signal(signal.SIGINT))
        result = made.cli("generate-negatives", "tiny.yaml", "--set", "negatives.seed=1", "--run-dir", "other")
    assert result.status == 130
    result = made.cli("evaluate", "tiny.yaml", "--run-dir", "other")
    assert result.status == 0, result.err
    assert "artifact" not in stages(made, "other")["generate-negatives"]
    page = (made.root / "other/report.html").read_text()
    assert page.index(">evaluate<") < page.index(">generate-negatives (not finished)<")


def test_quality_is_printed_and_kept(made) -> None:
    result = made.cli("quality", "tiny.yaml")
    assert result.status == 0, result.err
    assert "autoregressive" in result.out
    table = pq.read_table(made.root / "runs" / "tiny" / "latest" / "quality.parquet")
    assert {"target", "autoregressive"} <= set(table["strategy"].to_pylist())
    assert "Overlap with training examples" in result.out
    leakage = pq.read_table(made.root / "runs" / "tiny" / "latest" / "leakage.parquet").to_pylist()
    assert {(row["split"], row["part"]) for row in leakage} >= {("test", "prompt"), ("test", "target")}


@pytest.mark.slow
def test_an_adapter_is_evaluated_as_a_system(made) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.model)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(made.root / "adapter")
    settings = [f"evaluate.systems.plain={{model: {made.model}}}", "evaluate.systems.lora={model: adapter}",
                "evaluate.compare=[[lora, plain]]"]  # fmt: skip
    result = made.cli("evaluate", "tiny.yaml", *(part for setting in settings for part in ("--set", setting)))
    assert result.status == 0, result.err
    rows = {(row["system"], row["metric"]): row["value"] for row in figures(made)}
    assert rows["lora", "exact tie against plain"] == 1, "an untrained adapter changes nothing"


def test_an_api_and_the_ground_truth_in_a_report(made) -> None:
    with serve() as server:
        settings = [
            f"apis.mini.url={server.url}",
            "apis.mini.model=m",
            "evaluate.systems.gpt={model: mini}",
            "evaluate.baseline=ground-truth",
            "evaluate.judges=[longer]",
            "evaluate.compare=[[gpt, cpo]]",
        ]
        options = [part for setting in settings for part in ("--set", setting)]
        result = made.cli("evaluate", "tiny.yaml", *options)
        assert result.status == 0, result.err
        assert len(server.seen) == 4
        assert made.cli("evaluate", "tiny.yaml", *options).status == 0
        assert len(server.seen) == 4
    page = (made.root / "runs/tiny/latest/report.html").read_text()
    assert f"m at {server.url}" in page
    rows = {(row["system"], row["metric"]) for row in figures(made)}
    assert {("gpt", "longer win rate"), ("cpo", "longer win rate"), ("gpt", "longer win rate against cpo")} <= rows
    assert ("gpt", "target NLL") not in rows


@pytest.mark.slow
def test_a_run_exports_figures_outputs_curves_and_costs(made) -> None:
    """Figures as Markdown, outputs for AlpacaEval, curves of ensembles, and the total cost of the APIs."""
    with serve() as server:
        settings = [
            f"apis.mini={{url: {server.url}, model: m, input_price: 1, output_price: 2}}",
            "evaluate.systems.gpt={model: mini}",
            "evaluate.ensembles={both: {of: [cpo, start], alphas: [1, 0.5]}}",
            "evaluate.judges=[longer]",
        ]
        options = [part for setting in settings for part in ("--set", setting)]
        assert made.cli("evaluate", "tiny.yaml", *options).status == 0
        first = json.loads((made.root / "runs/tiny/latest/run.json").read_text())["stages"]["evaluate"]
        run = made.run_dir
        assert made.cli("evaluate", "tiny.yaml", *options, "--set", "evaluate.bootstrap=60").status == 0
        (elsewhere,) = json.loads((made.run_dir / "run.json").read_text())["stages"].values()
        assert elsewhere["apis"] == {}, "another recipe on the same outputs asks for nothing"
        assert made.cli("evaluate", "tiny.yaml", *options).status == 0
        assert made.run_dir == run
    again = json.loads((run / "run.json").read_text())["stages"]["evaluate"]
    spent = again["apis"]["mini"]
    assert spent == first["apis"]["mini"], "nothing is requested again, and the cost of the first run is kept"
    assert spent["usd"] == pytest.approx((spent["prompt_tokens"] + 2 * spent["written_tokens"]) / 1e6)
    assert again["total_seconds"] == pytest.approx(first["total_seconds"] + again["seconds"], abs=0.01)
    page = (run / "report.html").read_text()
    assert f"mini: {spent['prompt_tokens']:,} prompt tokens and" in page
    assert "longer win rate of ensembles against α. both, greedy: " in page
    assert "| metric | start (baseline) |" in (run / "metrics.md").read_text().replace("ground-truth | ", "")
    verdicts = pq.read_table(made.store / again["artifact"] / "verdicts.parquet").to_pylist()
    others = {"cpo", "gpt", "both@0.5", "both@1"}
    assert {(row["system"], row["opponent"]) for row in verdicts} == {(name, "start") for name in others}
    assert len(verdicts) == 4 * len(others)
    for row in verdicts:
        scores = [json.loads(said["raw"]) for said in row["orders"]] or [
            {"a": 0, "b": 0}
        ]  # equal outputs are not judged
        a, b = scores[0]["a"], scores[0]["b"]
        assert row["winner"] == ("tie" if a == b else "a" if a > b else "b")
    (outputs,) = (run / "model_outputs/gpt").glob("*.json")
    rows = json.loads(outputs.read_text())
    assert len(rows) == 4
    assert set(rows[0]) == {"instruction", "output", "generator", "dataset"}
    assert (run / "model_outputs/both@0.5/greedy.json").is_file()
    assert made.cli("store", "verify").status == 0
