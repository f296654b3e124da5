"""The commands, stage by stage and all at once, on a tiny project."""

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cpo_pipe.recipe.load import builtin_recipes, load_recipe
from tests.support.api_server import serve
from tests.support.damage import rot
from tests.support.marks import slow_except

STAGES = ("prepare", "generate-negatives", "rank", "train", "evaluate", "run")


def commands_in(text: str) -> list[list[str]]:
    """Arguments of the commands that a message names."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(cpo-pipe [^`]*)`", text)]


# ── the full path ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stage_without_its_input_names_the_command_and_that_command_unblocks_it(project) -> None:
    """Only `evaluate` is asked for, and what its errors name: that leads from nothing to the report."""
    followed = []
    for _ in range(8):
        result = project.cli("evaluate", "tiny.yaml")
        if result.status == 0:
            break
        assert result.status == 2
        (command,) = commands_in(result.error())
        followed.append(" ".join(command))
        done = project.cli(*command)
        assert done.status == 0, done.err
    assert followed == [
        "prepare tiny.yaml",
        "train tiny.yaml start",
        "generate-negatives tiny.yaml",
        "rank tiny.yaml",
        "train tiny.yaml cpo",
    ]
    assert (project.root / "runs/tiny/report.html").is_file()
    assert "start" in result.out
    assert load_recipe(str(project.root / "runs/tiny/recipe.yaml")) == load_recipe("tiny.yaml")


@pytest.mark.parametrize(
    ("stage", "needs"),
    [("generate-negatives", "prepare"), ("rank", "prepare"), ("train", "prepare"), ("evaluate", "prepare")],
)
def test_without_examples_every_stage_names_prepare(project, stage: str, needs: str) -> None:
    result = project.cli(stage, "tiny.yaml", *(["start"] if stage == "train" else []))
    assert (result.status, commands_in(result.error())) == (2, [[needs, "tiny.yaml"]])


def test_the_named_command_repeats_the_options(project) -> None:
    options = ["--set", "train.start.max_steps=1", "--store", "my store", "--run-dir", "here"]
    first = project.cli("train", "tiny.yaml", "start", *options)
    assert commands_in(first.error()) == [["prepare", "tiny.yaml", *options]]
    assert project.cli("prepare", "tiny.yaml", *options).status == 0
    assert project.cli("train", "tiny.yaml", "start", *options).status == 0
    assert (project.root / "my store/checkpoints").is_dir()
    assert not project.store.exists()


def test_run_makes_all_and_a_second_run_nothing(project) -> None:
    assert project.cli("run", "tiny.yaml").status == 0
    before = project.made()
    again = project.cli("run", "tiny.yaml")
    assert again.status == 0
    assert project.made() == before
    assert "(found in examples/" in again.err
    assert "train cpo: reused checkpoints/" in again.err
    assert "0 made, 48 reused" in again.err  # 16 prompts × 3


def test_damaged_weights_are_named_and_made_again_but_not_read_where_nothing_is_missing(made) -> None:
    metrics = made.root / "runs/tiny/metrics.parquet"
    intact = pq.read_table(metrics)
    specs = {path.parent: json.loads(path.read_text()) for path in made.store.glob("checkpoints/*/spec.json")}
    last = next(folder for folder, spec in specs.items() if spec["settings"]["objective"] == "cpo")
    rot(last / "model.safetensors", made.store)
    assert made.cli("run", "tiny.yaml").status == 0  # opens no weights
    shutil.rmtree(made.store / "generations")
    shutil.rmtree(made.store / "metrics")
    refused = made.cli("run", "tiny.yaml")
    assert refused.status == 1
    assert f"checkpoints/{last.name}/model.safetensors: damaged" in refused.error()
    assert "run the command again to quarantine it and make it again" in refused.error()
    again = made.cli("run", "tiny.yaml")
    assert again.status == 0, again.err
    assert f"checkpoints/{last.name} is damaged (model.safetensors)" in again.err
    assert len(list(last.parent.glob(f"{last.name}.damaged-*"))) == 1
    assert pq.read_table(metrics).equals(intact)


def test_single_stages_find_what_run_made(made) -> None:
    before = made.made()
    for stage in STAGES:
        result = made.cli(stage, "tiny.yaml")
        assert result.status == 0, result.err
    assert made.made() == before


def test_train_without_names_lists_what_waits(project) -> None:
    project.cli("prepare", "tiny.yaml")
    result = project.cli("train", "tiny.yaml")
    assert result.status == 0
    assert "train start: 2 steps" in result.err
    assert "cpo is waiting: 48 negatives are missing" in result.out
    assert commands_in(result.out) == [["generate-negatives", "tiny.yaml"]]


def test_train_with_names_trains_only_those(project) -> None:
    project.cli("prepare", "tiny.yaml")
    result = project.cli("train", "tiny.yaml", "cpo")
    assert (result.status, commands_in(result.error())) == (2, [["train", "tiny.yaml", "start"]])
    assert not (project.store / "checkpoints").exists()


def test_run_without_evaluate_still_makes_the_negatives(project) -> None:
    recipe = yaml.safe_load((project.root / "tiny.yaml").read_text())
    del recipe["train"]["cpo"], recipe["evaluate"]
    project.write("part.yaml", yaml.safe_dump(recipe))
    assert project.cli("run", "part.yaml").status == 0
    assert (project.store / "groups").is_dir()
    assert not (project.store / "metrics").exists()


def test_the_runs_folder_has_the_recipe_of_what_was_made(made) -> None:
    resolved = made.root / "runs/tiny/recipe.yaml"
    before = resolved.read_text()
    assert "\nname: tiny\n" in before
    assert made.cli("prepare", "tiny.yaml", "--set", "data.source=absent.jsonl").status == 2
    assert made.cli("evaluate", "tiny.yaml", "--set", "train.cpo.beta=0.3").status == 2  # is not trained
    assert resolved.read_text() == before
    assert made.cli("train", "tiny.yaml", "cpo", "--set", "train.cpo.beta=0.3").status == 0
    assert load_recipe(str(resolved)).train["cpo"].beta == 0.3


def shown_artifacts(project) -> dict[str, str]:
    html = (project.root / "runs/tiny/report.html").read_text()
    return dict(re.findall(r"<dt>([^<]*)</dt><dd><code>([^<]*)</code></dd>", html))


def test_the_report_lists_what_this_recipe_resolves_to(made) -> None:
    """Not what another recipe made in the same folder."""
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
    html = (made.root / "runs/tiny/report.html").read_text()
    assert "No negatives are shown: 48 negatives are missing: run `cpo-pipe generate-negatives tiny.yaml" in html
    assert made.cli("evaluate", "tiny.yaml").status == 0
    html = (made.root / "runs/tiny/report.html").read_text()
    assert "No negatives are shown" not in html
    assert "autoregressive" in html
    # What is wrong with the input is not taken for what is missing.
    result = made.cli("evaluate", "tiny.yaml", "--set", "negatives.sources.autoregressive.max_new_tokens=127")
    assert result.status == 2
    assert "negatives.sources.autoregressive.max_new_tokens is 127" in result.error()


def test_the_report_shows_how_near_the_negatives_are(made) -> None:
    assert made.cli("run", "tiny.yaml", "--set", "rank={}").status == 0
    html = (made.root / "runs/tiny/report.html").read_text()
    (groups,) = (path for path in made.store.glob("groups/*") if json.loads((path / "spec.json").read_text())["scorer"])
    rows = [row for shard in groups.glob("shards/*.parquet") for row in pq.read_table(shard).to_pylist()]
    cosines = [candidate["similarity"] for row in rows for candidate in row["candidates"][1:]]
    assert len(cosines) > 16
    assert f"{len(cosines)} negatives, median {statistics.median(cosines):.2f}" in html


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_set_overrides_and_the_last_one_wins(project) -> None:
    overrides = ["--set", "data.train=10", "--set", "data.train=12", "--set", "name=other"]
    result = project.cli("prepare", "tiny.yaml", *overrides)
    assert "examples: 12 train" in result.err
    assert load_recipe("runs/other/recipe.yaml").data.train == 12


def test_store_from_the_environment(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_PIPE_STORE", str(project.root / "elsewhere"))
    assert project.cli("prepare", "tiny.yaml").status == 0
    assert (project.root / "elsewhere/examples").is_dir()
    assert not project.store.exists()
    # The environment says it already: the named command need not.
    assert commands_in(project.cli("train", "tiny.yaml", "cpo").error()) == [["train", "tiny.yaml", "start"]]
    assert project.cli("prepare", "tiny.yaml", "--store", "third").status == 0  # the option is the stronger
    assert (project.root / "third/examples").is_dir()


def test_a_built_in_recipe_goes_by_its_name(project) -> None:
    assert commands_in(project.cli("train", "demo", "mle").error()) == [["prepare", "demo"]]


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_option_with_its_default(cli: Callable, stage: str) -> None:
    result = cli(stage, "--help")
    text = " ".join(result.out.replace("│", " ").split())
    assert result.status == 0
    for option, default in {
        "--set": "the recipe unchanged", "--store": "cpo-store", "--run-dir": "runs/NAME", "--debug": "off",
    }.items():  # fmt: skip
        assert re.search(rf"{option} [^\]]*(\[env var: CPO_PIPE_STORE\] )?\[default: \(?{default}\)?\]", text), text
    assert "CPO_PIPE_STORE" in text
    assert "Recipe: a YAML file or the name of a built-in one." in text
    if stage == "train":
        assert "[default: (all whose inputs exist)]" in text


def test_help_of_all(cli: Callable) -> None:
    assert all(stage in cli("--help").out for stage in (*STAGES, "init", "demo"))
    assert cli().out == cli("--help").out


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", builtin_recipes())
def test_init_prints_what_the_recipe_sets(cli: Callable, tmp_path: Path, name: str) -> None:
    text = cli("init", name).out
    assert text.startswith(f"# {name}.yaml: run it with `cpo-pipe run FILE`; `cpo-pipe init {name} --full` prints")
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "my.yaml")) == load_recipe(name).model_copy(update={"name": "my"})


@pytest.mark.parametrize("name", builtin_recipes())
def test_init_full_prints_the_recipe_itself_with_every_key_commented(cli: Callable, tmp_path: Path, name: str) -> None:
    text = cli("init", name, "--full").out
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "my.yaml")) == load_recipe(name).model_copy(update={"name": "my"})

    assert max(map(len, text.splitlines())) < 400
    lines = re.sub(r"^(note: >-\n)(?:  .*\n)+", r"\1", text, flags=re.MULTILINE).splitlines()
    named = {
        "train",
        "systems",
        "decodings",
        "judges",
        "apis",
        "ensembles",
        "sources",
    }  # below them stand the user's own names
    path: list[str] = []
    keys = 0
    for before, line in zip(["", *lines], lines, strict=False):
        match = re.match(r"( *)(# )?([\w-]+):( |$)", line)
        if not match or (match[2] and not before.lstrip().startswith("#")):
            continue
        is_default = match[2] is not None
        if not is_default:
            path[len(match[1]) // 2 :] = [match[3]]
            below = {"scales", "config"} & {*path[:-1]}  # what stands there is no key of a recipe
            if len(path) > 1 and (below or (path[-2] in named and len(path) in (2, 3))):
                continue
        keys += 1
        assert before.strip().startswith("# "), f"{line!r} has no comment"
    assert keys > 60


# ── as a process ─────────────────────────────────────────────────────────────────────────────────────────────────


def process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "cpo-pipe"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "CPO_PIPE_STORE"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_installed_command(project) -> None:
    done = process("prepare", "tiny.yaml", cwd=project.root)
    assert (done.returncode, done.stdout) == (0, "")
    assert "examples: 16 train, 4 validation, 4 test; 0 rejected" in done.stderr
    failed = process("rank", "tiny.yaml", cwd=project.root)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: the training start is not done: run `cpo-pipe train tiny.yaml start`\n"


def test_an_ascii_locale_shows_other_characters_as_escapes(tmp_path: Path) -> None:
    done = process("init", "pairs", "--full", cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"Plackett\u2013Luce" in done.stdout


@pytest.fixture(params=slow_except(["SIGTERM", "SIGINT", "SIGTERM, in the background of a script"], "SIGINT"))
def signum(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal that ends a command. What a script starts with & is to ignore SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    name, background, _ = request.param.partition(", ")
    if background:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield signal.Signals[name]
    signal.signal(signal.SIGINT, before)


def test_a_stopped_command_says_so_and_keeps_its_rows(project, monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
    from cpo_pipe.pipeline.engines.transformers import TransformersEngine

    project.cli("prepare", "tiny.yaml")
    project.cli("train", "tiny.yaml", "start")
    generate, calls = TransformersEngine.generate, []

    def stopped_at_the_third(engine, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signum)
        return generate(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", stopped_at_the_third)
        result = project.cli(
            "generate-negatives", "tiny.yaml", "--set", "negatives.sources.autoregressive.batch_size=4"
        )
    assert result.status == 130
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("stopped; what was made is kept")
    stopped = stages(project)["generate-negatives"]
    assert set(stopped) == {"seconds", "total_seconds", "apis"}, "it took its time, and is not done"
    again = project.cli("generate-negatives", "tiny.yaml")
    assert "(24 made, 24 reused)" in again.err  # 2 batches of 4 prompts × 3 negatives were kept
    done = stages(project)["generate-negatives"]
    assert {"artifact", "started"} < set(done)
    assert done["total_seconds"] == pytest.approx(stopped["seconds"] + done["seconds"], abs=0.002)


def stages(project, run: str = "runs/tiny") -> dict[str, dict]:
    return json.loads((project.root / run / "run.json").read_text())["stages"]


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


def test_debug_shows_the_traceback(project) -> None:
    result = project.cli("rank", "tiny.yaml", "--debug")
    assert result.status == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: the examples are not prepared")


def test_quality_is_printed_and_kept(made) -> None:
    result = made.cli("quality", "tiny.yaml")
    assert result.status == 0, result.err
    assert "autoregressive" in result.out
    table = pq.read_table(made.root / "runs" / "tiny" / "quality.parquet")
    assert {"target", "autoregressive"} <= set(table["strategy"].to_pylist())


# ── ensembles, written out ───────────────────────────────────────────────────────────────────────────────────────

ENSEMBLES = ("--set", "evaluate.ensembles={mix: {of: [start, cpo], alphas: [0, 0.5, 1]}}")


def test_an_ensemble_at_its_ends_is_its_models_whose_outputs_are_used(made) -> None:
    def kept(kind: str) -> set[Path]:
        return {path.parent for path in made.store.glob(f"{kind}/*/spec.json")}

    checkpoints, generations = kept("checkpoints"), kept("generations")
    result = made.cli("evaluate", "tiny.yaml", *ENSEMBLES)
    assert result.status == 0, result.err
    (merged,), (written,) = kept("checkpoints") - checkpoints, kept("generations") - generations
    assert json.loads((merged / "spec.json").read_text())["merge"][0][1] == 0.5
    fingerprint = json.loads((merged / "manifest.json").read_text())["fingerprint"]
    assert json.loads((written / "spec.json").read_text())["model"] == fingerprint
    rows = {(row["system"], row["metric"]): row["value"] for row in figures(made)}
    assert {system for system, _ in rows} == {"ground-truth", "start", "cpo", "mix@0", "mix@0.5", "mix@1"}
    assert rows["mix@1", "exact tie"] == 1, "the baseline itself"
    for metric in ("target NLL", "rep-4", "exact match"):
        assert (rows["mix@0", metric], rows["mix@1", metric]) == (rows["cpo", metric], rows["start", metric])
    assert rows["mix@0.5", "target NLL"] not in (rows["cpo", "target NLL"], rows["start", "target NLL"])


def figures(project) -> list[dict]:
    return pq.read_table(project.root / "runs/tiny/metrics.parquet").to_pylist()


def test_merge_writes_a_model_that_transformers_loads(made) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = made.cli("merge", "tiny.yaml", "mix@0.5", "--out", "out/mix", *ENSEMBLES)
    assert result.status == 0, result.err
    assert result.out == "system mix@0.5: written to out/mix\n"
    hashes = trainings(made)
    start, cpo, mix = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (made.store / hashes["start"], made.store / hashes["cpo"], made.root / "out/mix")
    )
    assert all((mix[name] == start[name] * 0.5 + cpo[name] * 0.5).all() for name in mix)
    tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (made.root / "out/mix", made.model)]
    assert tokenizers[0] == tokenizers[1]
    assert not [*(made.root / "out").glob(".tmp-*")]


def trainings(project) -> dict[str, str]:
    return {
        name.removeprefix("train "): stage["artifact"] for name, stage in stages(project).items() if "train " in name
    }


def test_merge_writes_any_system_but_overwrites_nothing(made) -> None:
    (made.root / "empty").mkdir()
    assert made.cli("merge", "tiny.yaml", "cpo", "--out", "empty").status == 0
    kept = {path.name: path.read_bytes() for path in (made.root / "empty").iterdir()}
    assert kept["model.safetensors"] == (made.store / trainings(made)["cpo"] / "model.safetensors").read_bytes()
    made.write("file", "mine")
    for out in ("empty", "file"):
        result = made.cli("merge", "tiny.yaml", "start", "--out", out)
        assert result.status == 2
        assert result.error() == f"error: --out {out}: already exists; name a folder that is new or empty"
    assert {path.name: path.read_bytes() for path in (made.root / "empty").iterdir()} == kept
    assert (made.root / "file").read_text() == "mine"


def test_merge_of_what_is_no_model(made) -> None:
    before = made.made()
    result = made.cli("merge", "tiny.yaml", "mix@0.4", "--out", "out", *ENSEMBLES)
    assert result.status == 2
    assert "error: system mix@0.4: not in evaluate; did you mean mix@0" in result.error()
    api = ("--set", "apis.mini={url: 'http://127.0.0.1:9/v1', model: m}", "--set", "evaluate.systems.gpt={model: mini}")
    result = made.cli("merge", "tiny.yaml", "gpt", "--out", "out", *api)
    assert result.status == 2
    assert "system gpt: is an API, which has no weights to merge" in result.error()
    result = made.cli("merge", "tiny.yaml", "start", "--out", "tiny.yaml/out")
    assert result.status == 2
    assert made.made() == before
    assert not (made.root / "out").exists()


def test_ensembles_of_apis_are_refused_before_anything_is_asked(made) -> None:
    api = ("--set", "apis.mini={url: 'http://127.0.0.1:9/v1', model: m}")
    sections = ("ensembles={mix: {of: [start, mini], alphas: [0]}}", "systems.x={merge: {start: 0.5, mini: 0.5}}")
    for section in sections:
        result = made.cli("evaluate", "tiny.yaml", *api, "--set", f"evaluate.{section}")
        assert result.status == 2
        assert "names mini, which is an API and has no weights here; name a local or hub model" in result.error()


def test_an_adapter_is_a_system(made) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.model)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(made.root / "adapter")
    settings = [f"evaluate.systems.plain={{model: {made.model}}}", "evaluate.systems.lora={model: adapter}",
                "evaluate.compare=[[lora, plain]]"]  # fmt: skip
    result = made.cli("evaluate", "tiny.yaml", *(part for setting in settings for part in ("--set", setting)))
    assert result.status == 0, result.err
    rows = {(row["system"], row["metric"]): row["value"] for row in figures(made)}
    assert rows["lora", "exact tie against plain"] == 1, "an adapter that is not trained changes nothing"


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
    page = (made.root / "runs/tiny/report.html").read_text()
    assert f"m at {server.url}" in page
    rows = {(row["system"], row["metric"]) for row in figures(made)}
    assert {("gpt", "longer win rate"), ("cpo", "longer win rate"), ("gpt", "longer win rate against cpo")} <= rows
    assert ("gpt", "target NLL") not in rows


def test_a_run_leaves_more_than_its_report(made) -> None:
    """Figures as Markdown, outputs as AlpacaEval reads them, curves of ensembles, and what the APIs took, added up."""
    with serve() as server:
        settings = [
            f"apis.mini={{url: {server.url}, model: m, input_price: 1, output_price: 2}}",
            "evaluate.systems.gpt={model: mini}",
            "evaluate.ensembles={both: {of: [cpo, start], alphas: [1, 0.5]}}",
            "evaluate.judges=[longer]",
        ]
        options = [part for setting in settings for part in ("--set", setting)]
        assert made.cli("evaluate", "tiny.yaml", *options).status == 0
        first = json.loads((made.root / "runs/tiny/run.json").read_text())["stages"]["evaluate"]
        assert made.cli("evaluate", "tiny.yaml", *options, "--set", "evaluate.bootstrap=60").status == 0
    run = made.root / "runs/tiny"
    again = json.loads((run / "run.json").read_text())["stages"]["evaluate"]
    spent = again["apis"]["mini"]
    assert spent == first["apis"]["mini"], "nothing was asked again, and nothing is forgotten"
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
        scores = [json.loads(said["raw"]) for said in row["orders"]] or [{"a": 0, "b": 0}]  # equal outputs: unasked
        a, b = scores[0]["a"], scores[0]["b"]
        assert row["winner"] == ("tie" if a == b else "a" if a > b else "b")
    (outputs,) = (run / "model_outputs/gpt").glob("*.json")
    rows = json.loads(outputs.read_text())
    assert len(rows) == 4
    assert set(rows[0]) == {"instruction", "output", "generator", "dataset"}
    assert (run / "model_outputs/both@0.5/greedy.json").is_file()
    assert made.cli("store", "verify").status == 0


def test_paths_of_options_know_the_home_folder_and_are_not_empty(project, monkeypatch: pytest.MonkeyPatch) -> None:
    home = project.root / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CPO_PIPE_STORE", "~/store")
    assert project.cli("prepare", "tiny.yaml", "--run-dir", "~/run").status == 0
    assert (home / "run/recipe.yaml").is_file()
    assert (home / "store/examples").is_dir()
    assert not (project.root / "~").exists()
    before = sorted(project.root.rglob("*"))
    for option in ("--store", "--run-dir"):
        result = project.cli("prepare", "tiny.yaml", option, "")
        assert result.status == 2
        assert "is empty, which would mean the current folder; name a folder" in result.error()
    assert sorted(project.root.rglob("*")) == before


def test_annotations_that_are_not_utf8_are_an_error_before_anything_is_made(project) -> None:
    project.write("annotations.csv", b"prompt,output_a,output_b,winner\np,caf\xe9,y,a\n")
    result = project.cli("run", "tiny.yaml", "--set", "evaluate.annotations=annotations.csv")
    assert result.status == 2
    assert "evaluate.annotations annotations.csv: annotations.csv:2: not UTF-8 (column output_a" in result.error()
    assert not project.made()
