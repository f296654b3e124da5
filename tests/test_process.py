"""The installed command as a process: its exit status, its streams, and signals."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.marks import slow_except
from tests.support.project import stages


def process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "cpo-pipe"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "CPO_PIPE_STORE"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
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
    """Return a signal that ends a command. A script's background processes ignore SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    name, background, _ = request.param.partition(", ")
    if background:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield signal.Signals[name]
    signal.signal(signal.SIGINT, before)


def test_a_stopped_command_reports_it_and_keeps_its_rows(project, monkeypatch: pytest.MonkeyPatch, signum: int) -> None:
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
        batches = ["--set", "negatives.sources.autoregressive.batch_size=4"]
        result = project.cli("generate-negatives", "tiny.yaml", *batches)
    assert result.status == 130
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("stopped; what was made is kept")
    stopped = stages(project)["generate-negatives"]
    assert set(stopped) == {"seconds", "total_seconds", "apis"}, "its time is recorded, and it is not complete"
    again = project.cli("generate-negatives", "tiny.yaml", *batches)
    assert "(24 made, 24 reused)" in again.err  # 2 batches of 4 prompts × 3 negatives were kept
    done = stages(project)["generate-negatives"]
    assert {"artifact", "started"} < set(done)
    assert done["total_seconds"] == pytest.approx(stopped["seconds"] + done["seconds"], abs=0.002)
