"""The commands, stage by stage and all at once, on a tiny project."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cpo_pipe.data.recipe import builtin_recipes, load_recipe

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
    options = ["--set", "train.start.steps=1", "--store", "my store", "--run-dir", "here"]
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
        "--set": "the recipe as it is", "--store": "cpo-store", "--run-dir": "runs/NAME", "--debug": "off",
    }.items():  # fmt: skip
        assert re.search(rf"{option} [^\]]*(\[env var: CPO_PIPE_STORE\] )?\[default: \(?{default}\)?\]", text), text
    assert "CPO_PIPE_STORE" in text
    assert "Recipe: a YAML file or the name of a built-in one." in text
    if stage == "train":
        assert "[default: (all whose inputs are there)]" in text


def test_help_of_all(cli: Callable) -> None:
    assert all(stage in cli("--help").out for stage in (*STAGES, "init", "demo"))
    assert cli().out == cli("--help").out


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", builtin_recipes())
def test_init_prints_the_recipe_itself_with_every_key_commented(cli: Callable, tmp_path: Path, name: str) -> None:
    text = cli("init", name).out
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "my.yaml")) == load_recipe(name)

    lines = text.splitlines()
    named = {"train", "systems", "decodings"}  # below them stand the user's own names
    path: list[str] = []
    keys = 0
    for before, line in zip(["", *lines], lines, strict=False):
        match = re.match(r"( *)(# )?([\w-]+):( |$)", line)
        if not match or (match[2] and not before.lstrip().startswith("#")):
            continue
        is_default = match[2] is not None
        if not is_default:
            path[len(match[1]) // 2 :] = [match[3]]
            if len(path) > 1 and path[-2] in named and len(path) in (2, 3):
                continue
        keys += 1
        assert before.strip().startswith("# "), f"{line!r} has no comment"
    assert keys > 60


# ── as a process ─────────────────────────────────────────────────────────────────────────────────────────────────


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "cpo-pipe"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "CPO_PIPE_STORE"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_installed_command(project) -> None:
    done = process("prepare", "tiny.yaml", cwd=project.root)
    assert (done.returncode, done.stdout) == (0, "")
    assert "examples: 16 train, 4 validation, 4 test; 0 rejected" in done.stderr
    failed = process("rank", "tiny.yaml", cwd=project.root)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: the training start is not done: run `cpo-pipe train tiny.yaml start`\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
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
        result = project.cli("generate-negatives", "tiny.yaml", "--set", "negatives.batch_size=4")
    assert result.status == 130
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("stopped; what was made is kept")
    again = project.cli("generate-negatives", "tiny.yaml")
    assert "(24 made, 24 reused)" in again.err  # 2 batches of 4 prompts × 3 negatives were kept


def test_debug_shows_the_traceback(project) -> None:
    result = project.cli("rank", "tiny.yaml", "--debug")
    assert result.status == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: the examples are not prepared")
