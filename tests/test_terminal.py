"""What commands show: foreign text in it can do nothing to a terminal."""

import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.store import Store
from cpo_pipe.terminal import reported
from tests.support.hostile import HOSTILE, RAW, SHOWN
from tests.support.project import Project, Result

LINE = SHOWN.replace(r"\re", " e")
"""As one line shows it: a carriage return is white space."""


def ends(error: Exception, debug: bool = False) -> int:
    """Exit status of a command that fails."""
    with pytest.raises(typer.Exit) as caught, reported(debug):
        raise error
    return caught.value.exit_code


@pytest.mark.usefixtures("cli")  # which puts the log back
class TestReported:
    def test_errors(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert (ends(InputError(HOSTILE)), ends(ValueError(f"x\n{HOSTILE}"))) == (2, 1)
        assert capfd.readouterr().err == (f"error: {LINE}\nerror: ValueError: x {LINE} (--debug shows the traceback)\n")
        assert ends(OSError(20, "no", f"/{HOSTILE}")) == 2
        assert capfd.readouterr().err.startswith(f"error: /{LINE}: no;")

    def test_tracebacks(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert ends(ValueError(HOSTILE), debug=True) == 1
        err = capfd.readouterr().err
        assert "Traceback" in err
        assert f"ValueError: {SHOWN}" in err
        assert not RAW.search(err)

    def test_the_log_and_libraries(self, capfd: pytest.CaptureFixture[str]) -> None:
        theirs = logging.getLogger("theirs")
        handler = logging.StreamHandler()
        theirs.addHandler(handler)
        before = logging.getLogRecordFactory()
        try:
            with reported(False):
                logging.getLogger("cpo_pipe.x").info("ours: %s\n%s", HOSTILE, "next")
                theirs.warning("theirs: %s", HOSTILE)
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    logging.captureWarnings(False)  # pytest has its own way of catching them
                    logging.captureWarnings(True)
                    warnings.warn(f"warned: {HOSTILE}", stacklevel=1)
                try:
                    raise ValueError(HOSTILE)
                except ValueError:
                    logging.getLogger("cpo_pipe.x").exception("failed")
        finally:
            theirs.removeHandler(handler)
        err = capfd.readouterr().err
        assert not RAW.search(err)
        assert f"ours: {LINE} next\n" in err, "what is foreign begins no line of the log"
        assert err.count(f"theirs: {SHOWN}\n") == 2, "by its own handler, and by ours"
        assert f"warned: {SHOWN}" in err
        assert f"ValueError: {SHOWN}" in err
        assert logging.getLogRecordFactory() is before


def test_names_of_columns_and_options(project: Project) -> None:
    row = {HOSTILE: "x", "target": "y"}
    project.write("odd.jsonl", "".join(json.dumps(row) + "\n" for _ in range(9)))
    result = project.cli("prepare", "tiny.yaml", "--set", "data.source=odd.jsonl")
    assert f"its columns ({LINE}, target) are those of no known format" in result.error()
    assert not RAW.search(result.out + result.err)
    for arguments in (["prepare", f"{HOSTILE}.yaml"], ["prepare", "tiny.yaml", "--set", f"{HOSTILE}=1"], [HOSTILE],
                      ["train", "tiny.yaml", HOSTILE], ["store", "show", HOSTILE]):  # fmt: skip
        result = project.cli(*arguments)
        assert result.status == 2
        assert r"\x1b]0;title" in result.error()
        assert not RAW.search(result.out + result.err)


def test_texts_that_are_refused(project: Project) -> None:
    rows = [{"prompt": [HOSTILE], "target": "y"}] * 9
    project.write("odd.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = project.cli("prepare", "tiny.yaml", "--set", "data.source=odd.jsonl")
    assert "9 of 9 rows were rejected (9 not text)" in result.error()
    assert re.search(r"all of them are in runs/tiny/\d{8}-\d{4}-[0-9a-f]{6}/rejected\.parquet", result.error())
    assert Path("runs/tiny/latest/rejected.parquet").is_file()
    assert not RAW.search(result.out + result.err)


def test_what_stands_in_a_store(tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "store")
    run = tmp_path / f"run{HOSTILE}".replace("/", "")
    run.mkdir()
    store.register_run(run)
    spec = {"judge": HOSTILE, "pattern": HOSTILE, "more": {HOSTILE: [HOSTILE]}}
    artifact = store.artifact("tokenizers", spec)
    with artifact.lock(), artifact.create() as folder:
        (folder.path / f"file{HOSTILE}".replace("/", "")).write_text("x")
        folder.facts["fact"] = HOSTILE
    other = store.artifact("tokenizers", {"judge": "b"})
    with other.lock(), other.create() as folder:
        (folder.path / "x").write_text("x")
    name, twin = (f"tokenizers/{one.path.name}" for one in (artifact, other))
    for command in (["ls"], ["show", name], ["diff", name, twin], ["verify"], ["gc"]):
        if command == ["gc"]:
            run.rmdir()
        result = cli("store", *command, "--store", tmp_path / "store")
        assert result.status == 0, result.err
        assert not RAW.search(result.out + result.err), command
        if command != ["verify"]:
            assert r"\x1b" in result.out, command
    listed = cli("store", "ls", "--json", "--store", tmp_path / "store").out
    assert not RAW.search(listed)
    assert spec in [record["spec"] for record in json.loads(listed)], "for scripts it is the text itself"


def test_an_export_shows_texts_of_the_recipe_as_they_are(project: Project) -> None:
    note = f"{HOSTILE}\n````\n# A heading <script>"
    recipe = f"note: {json.dumps(note)}\n" + Path("tiny.yaml").read_text()
    project.write("odd.yaml", recipe)
    batch = ("--set", "negatives={sources: {batch: {count: 1}}}")
    for stage in ("prepare", "generate-negatives", "rank"):
        assert project.cli(stage, "odd.yaml", *batch).status == 0
    assert project.cli("export", "odd.yaml", *batch, "--out", "out").status == 0
    card = Path("out/README.md").read_text()
    assert not RAW.search(card)
    fence = re.findall(r"^(`+)yaml$", card, re.MULTILINE)
    (block,) = re.findall(rf"^{fence[0]}yaml\n(.*?)^{fence[0]}$", card, re.MULTILINE | re.DOTALL)
    assert r"\e]0;title" in block or r"\x1b]0;title" in block
    assert "evaluate:" in block, "nothing in the recipe ends the block"
