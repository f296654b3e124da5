"""Artifacts: complete or absent, and quarantined when damaged."""

from pathlib import Path

import pytest

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.store import Store
from tests.support.store import Crash, crash_at, make


def test_an_artifact_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, crashed = 0, True
    while crashed:
        point += 1
        store = Store(tmp_path / str(point))
        with monkeypatch.context() as patch:
            crash_at(patch, point)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            try:
                make(store, "new")
                crashed = False
            except Crash:
                pass
        artifact = Store(tmp_path / str(point)).artifact("checkpoints", {"p": 1})
        if not artifact.complete():
            assert not artifact.path.exists()
            make(store, "new")
        assert artifact.complete()
        assert (artifact.path / "weights").read_text() == "new"
        assert artifact.manifest["max_steps"] == 3
        assert [path.name for path in artifact.path.parent.iterdir() if not path.name.startswith(".locks")] == [
            artifact.path.name
        ]
    assert point > 5


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}}', '{"files": null}', '{"files": [1]}', "\x00"])
def test_a_manifest_of_another_form_is_damage(tmp_path: Path, content: str) -> None:
    make(Store(tmp_path), "good")
    artifact = Store(tmp_path).artifact("checkpoints", {"p": 1})
    (artifact.path / "manifest.json").write_text(content)
    assert not artifact.complete()
    with pytest.raises(RunError, match=r"manifest\.json: damaged"):
        _ = artifact.manifest
    make(Store(tmp_path), "good")
    assert artifact.complete()


def test_artifacts_whose_folders_were_swapped_are_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifacts = [Store(tmp_path).artifact("checkpoints", {"p": number}) for number in (1, 2)]
    for artifact in artifacts:
        with artifact.create() as writer:
            (writer.path / "weights").write_text(artifact.name)
    one, other = (artifact.path for artifact in artifacts)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    assert not any(artifact.complete() for artifact in artifacts)
    assert f"{artifacts[0].name} is damaged (its files belong to {artifacts[1].name})" in caplog.text


@pytest.mark.parametrize("harmed", ["weights", "manifest.json"])
def test_a_damaged_artifact_is_quarantined(tmp_path: Path, caplog: pytest.LogCaptureFixture, harmed: str) -> None:
    make(Store(tmp_path), "good")
    artifact = Store(tmp_path).artifact("checkpoints", {"p": 1})
    (artifact.path / harmed).write_text("bad")
    assert not artifact.complete()
    assert harmed in caplog.text
    make(Store(tmp_path), "good")
    assert artifact.complete()


def test_only_the_holder_of_the_lock_quarantines_an_artifact(tmp_path: Path) -> None:
    make(Store(tmp_path), "good")
    artifact = Store(tmp_path).artifact("checkpoints", {"p": 1})
    (artifact.path / "weights").write_text("bad")
    assert not artifact.complete()
    assert artifact.path.exists(), "another process may be making it again at this moment"
    with artifact.lock():
        assert not artifact.path.exists()
        assert len(list(artifact.path.parent.glob("*.damaged-*"))) == 1
