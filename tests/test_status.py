"""`cpo-pipe status`: what a run is doing, also after it was killed; and the log on and off a terminal."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpo_pipe import terminal
from cpo_pipe.data import progress
from cpo_pipe.data.progress import Step
from cpo_pipe.status import Status
from tests.support.project import Project, Result

STEP = Step("stage 3/8 rank", 412, 800, "groups", 22.0, "note")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/my/20260101-0000-abcdef"
    folder.mkdir(parents=True)
    (folder.parent / "latest").symlink_to(folder.name)
    return folder


def test_a_run_in_progress(run_dir: Path, cli: Callable[..., Result]) -> None:
    status = Status(run_dir)
    with status.stage("rank", "3/8", last=True):
        logging.getLogger("cpo_pipe").warning("too few")
        status.progress(STEP)
        first, step, warning = cli("status", "my").out.splitlines()
        assert re.fullmatch(
            rf"my/{run_dir.name}: running \(pid {os.getpid()} on .+\), stage 3/8 rank, \d+ s ago", first
        )
        assert step == f"  {STEP}"
        assert re.fullmatch(r"  last warning, \d\d:\d\d:\d\d: too few", warning)
        assert cli("status").out.splitlines()[0].startswith(f"my/{run_dir.name}: running")
    assert cli("status", "my.yaml").out.splitlines()[0].startswith(f"my/{run_dir.name}: done")


def test_how_a_stage_ended(run_dir: Path, cli: Callable[..., Result]) -> None:
    status = Status(run_dir)
    with pytest.raises(ValueError, match="no way"), status.stage("rank", "", last=True):
        raise ValueError("no way")
    out = cli("status", "my").out
    assert ": failed (" in out
    assert ", stage rank, " in out
    assert "  error: no way\n  what was made is kept: run the same command again to go on" in out
    with pytest.raises(KeyboardInterrupt), status.stage("rank", "", last=True):
        raise KeyboardInterrupt
    assert ": stopped (" in cli("status", "my").out


def test_a_process_with_the_same_pid_is_not_the_run(run_dir: Path, cli: Callable[..., Result]) -> None:
    with Status(run_dir).stage("rank", "3/8", last=True):
        content = json.loads((run_dir / "status.json").read_text())
        (run_dir / "status.json").write_text(json.dumps(content | {"born": content["born"] - 1000}))
        assert ": killed, its process is gone (" in cli("status", "my").out
        (run_dir / "status.json").write_text(json.dumps(content | {"host": "gpu7", "pid": 1}))
        assert ": running (pid 1 on gpu7)" in cli("status", "my").out, "nothing is known of another machine's processes"


def test_a_run_that_fails_between_two_stages(project: Project) -> None:
    (project.root / "o.jsonl").write_text('{"prompt": "nobody asked", "output": "x"}\n')
    assert project.cli("run", "tiny.yaml", "--set", "evaluate.systems.gpt={file: o.jsonl}").status == 2
    out = project.cli("status", "tiny").out
    assert ": failed (" in out
    assert "has no output for 4 of 4 examples" in out


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    status = Status(tmp_path / "gone")
    with status.stage("rank", "", last=True):
        status.progress(STEP)


def test_there_is_no_such_run(run_dir: Path, cli: Callable[..., Result]) -> None:
    assert cli("status").out == "no run in runs has begun\n"
    assert "status other: no run of this recipe in runs; `cpo-pipe runs` lists" in cli("status", "other").error()


@pytest.mark.slow
def test_a_killed_run_says_where_it_was(project: Project) -> None:
    command = [sys.executable, "-m", "cpo_pipe", "run", "tiny.yaml", "--set", "train.start.max_steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while "steps/s" not in (before := project.cli("status", "tiny").out) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert re.search(rf"running \(pid {process.pid} on .+\), stage 2/6 train start", before), before
    process.send_signal(signal.SIGKILL)
    process.wait()
    after = project.cli("status", "tiny").out
    assert "killed, its process is gone" in after
    assert re.search(r"  stage 2/6 train start: [\d,]+/100,000 steps, [\d.]+ steps/s, .+ left", after)


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stages_are_numbered_and_lines_have_the_time(project: Project) -> None:
    lines = project.cli("run", "tiny.yaml").err.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines), lines
    stages = [line[20:] for line in lines if line[20:].startswith("stage ")]
    assert stages == [
        "stage 1/6 prepare", "stage 2/6 train start", "stage 3/6 generate-negatives", "stage 4/6 rank",
        "stage 5/6 train cpo", "stage 6/6 evaluate",
    ]  # fmt: skip
    assert len({*lines}) == len(lines)


@pytest.mark.slow
def test_the_log_as_json(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    lines = [json.loads(line) for line in project.cli("run", "tiny.yaml", "--log-format", "json").err.splitlines()]
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    steps = [line["progress"] for line in lines if "progress" in line]
    assert {"label": "stage 2/6 train start", "done": 1, "total": 2, "unit": "steps"}.items() <= next(
        step for step in steps if "train start" in step["label"]
    ).items()
    assert {step["unit"] for step in steps} >= {"rows", "samples", "groups", "steps", "pairs"}


@pytest.mark.slow
def test_quiet_leaves_warnings_and_results(project: Project) -> None:
    result = project.cli("run", "tiny.yaml", "--quiet", "--set", "evaluate.mauve_seeds=1")
    assert result.status == 0
    assert all("warning" in line or "negatives" in line for line in result.err.splitlines()), result.err
    assert "exact win rate" in result.out


@pytest.mark.slow
def test_a_message_is_printed_once(project: Project) -> None:
    assert project.cli("run", "tiny.yaml").status == 0
    again = project.cli("run", "tiny.yaml").err.splitlines()
    said = [line[20:] for line in again]
    assert len(said) == len({*said})


def test_errors_in_json(project: Project) -> None:
    result = project.cli("prepare", "tiny.yaml", "--log-format", "json", "--set", "data.source=no.jsonl")
    assert result.status == 2
    said = [json.loads(line) for line in result.err.splitlines()][-1]
    assert said["level"] == "error"
    assert "data.source no.jsonl: no such file" in said["message"]


def test_a_message_is_news_again_after_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    handler = terminal._handler("text")
    for minute in (0, 1, 9, 11, 12, 30):
        record = logging.LogRecord("cpo_pipe.api", logging.WARNING, "", 0, "no answer", None, None)
        record.created = 60.0 * minute
        handler.handle(record)
    assert [line[14:16] for line in capsys.readouterr().err.splitlines()] == [
        time.strftime("%M", time.localtime(60.0 * minute)) for minute in (0, 11, 30)
    ]
