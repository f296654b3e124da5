"""The commands, stage by stage and all at once, on a tiny project; their options and their help."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
import yaml

from cpo_pipe import __version__
from cpo_pipe.recipe.load import load_recipe
from tests.support.damage import rot
from tests.support.project import commands_in

STAGES = ("prepare", "generate-negatives", "rank", "train", "evaluate", "run")


def test_a_stage_without_its_input_names_the_command_that_makes_it(project) -> None:
    """Following the errors of `evaluate` leads from nothing to the report."""
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
    assert (project.root / "runs/tiny/latest/report.html").is_file()
    assert "start" in result.out
    assert load_recipe(str(project.root / "runs/tiny/latest/recipe.yaml")) == load_recipe("tiny.yaml")


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


def test_run_makes_everything_and_a_second_run_nothing(project) -> None:
    assert project.cli("run", "tiny.yaml").status == 0
    before = project.made()
    again = project.cli("run", "tiny.yaml")
    assert again.status == 0
    assert project.made() == before
    assert "(found in examples/" in again.err
    assert "train cpo: reused checkpoints/" in again.err
    assert "0 made, 48 reused" in again.err  # 16 prompts × 3


def test_damaged_weights_are_named_and_trained_again_but_only_when_needed(made) -> None:
    metrics = made.root / "runs/tiny/latest/metrics.parquet"
    intact = pq.read_table(metrics)
    specs = {path.parent: json.loads(path.read_text()) for path in made.store.glob("checkpoints/*/spec.json")}
    last = next(folder for folder, spec in specs.items() if spec["settings"]["objective"] == "cpo")
    rot(last / "model.safetensors", made.store)
    assert made.cli("run", "tiny.yaml").status == 0  # reads no weights
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


def test_train_without_names_lists_waiting_trainings(project) -> None:
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


def test_the_last_of_several_set_options_wins(project) -> None:
    overrides = ["--set", "data.train=10", "--set", "data.train=12", "--set", "name=other"]
    result = project.cli("prepare", "tiny.yaml", *overrides)
    assert "examples: 12 train" in result.err
    assert load_recipe("runs/other/latest/recipe.yaml").data.train == 12


def test_store_from_the_environment(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_PIPE_STORE", str(project.root / "elsewhere"))
    assert project.cli("prepare", "tiny.yaml").status == 0
    assert (project.root / "elsewhere/examples").is_dir()
    assert not project.store.exists()
    # The store comes from the environment, so the named command does not repeat it.
    assert commands_in(project.cli("train", "tiny.yaml", "cpo").error()) == [["train", "tiny.yaml", "start"]]
    assert project.cli("prepare", "tiny.yaml", "--store", "third").status == 0  # the option takes precedence
    assert (project.root / "third/examples").is_dir()


def test_a_built_in_recipe_is_found_by_its_name(project) -> None:
    assert commands_in(project.cli("train", "demo", "mle").error()) == [["prepare", "demo"]]


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_option_with_its_default(cli: Callable, stage: str) -> None:
    result = cli(stage, "--help")
    text = " ".join(result.out.replace("│", " ").split())
    assert result.status == 0
    for option, default in {
        "--set": "the recipe unchanged", "--store": "cpo-store", "--run-dir": "runs/NAME/TIME-HASH", "--debug": "off",
    }.items():  # fmt: skip
        assert re.search(rf"{option} [^\]]*(\[env var: CPO_PIPE_STORE\] )?\[default: \(?{default}\)?\]", text), text
    assert "CPO_PIPE_STORE" in text
    assert "Recipe: a YAML file or the name of a built-in one." in text
    if stage == "train":
        assert "[default: (all whose inputs exist)]" in text


def test_help_lists_all_commands(cli: Callable) -> None:
    assert all(stage in cli("--help").out for stage in (*STAGES, "init", "demo"))
    assert cli().out == cli("--help").out


def test_debug_shows_the_traceback(project) -> None:
    result = project.cli("rank", "tiny.yaml", "--debug")
    assert result.status == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: the examples are not prepared")


def test_paths_in_options_expand_the_home_folder_and_must_not_be_empty(
    project, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_annotations_that_are_not_utf8_are_refused_before_anything_is_made(project) -> None:
    project.write("annotations.csv", b"prompt,output_a,output_b,winner\np,caf\xe9,y,a\n")
    result = project.cli("run", "tiny.yaml", "--set", "evaluate.annotations=annotations.csv")
    assert result.status == 2
    assert "evaluate.annotations annotations.csv: annotations.csv:2: not UTF-8 (column output_a" in result.error()
    assert not project.made()


def test_the_command_line_starts_without_heavy_packages() -> None:
    heavy = "torch", "transformers", "datasets", "sentence_transformers", "vllm", "ray", "matplotlib", "sklearn"
    code = f"import sys, cpo_pipe.cli; print(*{{*{heavy}}} & {{*sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []


def test_the_version(cli: Callable) -> None:
    assert (cli("--version").status, cli("--version").out) == (0, f"cpo-pipe {__version__}\n")


@pytest.mark.slow
def test_a_shell_completes_commands() -> None:
    asked = {"COMP_WORDS": "cpo-pipe ev", "COMP_CWORD": "1", "_CPO_PIPE_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "cpo_pipe"], env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["evaluate"]
