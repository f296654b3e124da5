"""`cpo-pipe doctor`: what it shows, and what it finds wrong."""

from collections.abc import Callable
from importlib.metadata import version

import pytest

from cpo_pipe import doctor
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from tests.support.project import Result

Cli = Callable[..., Result]


def test_a_sound_machine(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = cli("doctor", "--store", "here/store")
    assert result.status == 0, result.out
    rows = {line.split()[0]: line.split(maxsplit=1)[-1] for line in result.out.splitlines()}
    assert rows["torch"] == version("torch")
    assert "cores" in rows["CPU"]
    assert rows["transformers"] == "loads", "the last row of this name is the engine"
    assert rows["store"].startswith("here/store: ")
    assert "GiB free" in rows["store"]
    assert result.out.splitlines()[-1] == "nothing is wrong"


@pytest.mark.parametrize(("load", "advised"), [(0.0, False), (1e6, True)])
def test_busy_cores_are_said(cli: Cli, monkeypatch: pytest.MonkeyPatch, load: float, advised: bool) -> None:
    monkeypatch.setattr("psutil.getloadavg", lambda: (load, load, load))
    (row,) = [line for line in cli("doctor").out.splitlines() if line.startswith("  load ")]
    assert ("export OMP_NUM_THREADS=1" in row) is advised


def test_a_package_of_another_version_is_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: "4.0.0" if package == "transformers" else version(package))
    result = cli("doctor")
    assert result.status == 1
    (line,) = [line for line in result.out.splitlines() if line.startswith("wrong: cpo-pipe needs transformers")]
    assert "but 4.0.0 is installed: pip install 'transformers" in line
    assert "wrong: sentence-transformers needs transformers" in result.out, "which depends on it, too"


def test_a_package_that_is_not_installed_is_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(package: str) -> str:
        if package == "regex":
            raise doctor.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(doctor, "version", lookup)
    result = cli("doctor")
    assert result.status == 1
    assert "wrong: cpo-pipe needs regex" in result.out


def test_an_engine_that_does_not_load_is_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ENGINES", {"no_such_module": TransformersEngine})
    result = cli("doctor")
    assert result.status == 1
    assert "no_such_module        does not load: ModuleNotFoundError: No module named 'no_such_module'" in result.out
