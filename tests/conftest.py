"""Models, projects and servers that tests share."""

import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.models import make_model
from tests.support.project import Project, Result, fill
from tests.support.vllm import vllm_serving


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def new_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return lambda **config: make_model(tmp_path_factory.mktemp("model"), **config)


@pytest.fixture(scope="session", autouse=True)
def _short_samples() -> Iterator[None]:
    """Sampling to measure repetition would take most of a tiny training's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpo_pipe.trainer.samples.SAMPLE_TOKENS", 8)
        yield


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs `cpo-pipe ARGUMENTS…` in this process."""
    from cpo_pipe.cli import main

    monkeypatch.delenv("CPO_PIPE_STORE", raising=False)
    root, package, on_term = logging.getLogger(), logging.getLogger("cpo_pipe"), signal.getsignal(signal.SIGTERM)
    handlers, level, package_level = root.handlers[:], root.level, package.level

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capfd.readouterr())

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)
    package.setLevel(package_level)
    signal.signal(signal.SIGTERM, on_term)


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of which nothing is made."""
    fill(tmp_path, tiny_model)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, tiny_model, cli)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a project of which everything is made; not to be written to."""
    from cpo_pipe.data.store import Store
    from cpo_pipe.recipe.load import load_recipe
    from cpo_pipe.recipe.render import recipe_text
    from cpo_pipe.run import Run
    from cpo_pipe.runs import run_folder

    root = tmp_path_factory.mktemp("finished")
    fill(root, tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        recipe = load_recipe("tiny.yaml")
        folder = run_folder(recipe.name, recipe_text(recipe), root / "runs")
        Run(recipe, "tiny.yaml", Store(root / "cpo-store"), folder).everything()
    return root


@pytest.fixture
def made(project: Project, finished: Path) -> Project:
    """A project of which everything is made."""
    shutil.copytree(finished, project.root, dirs_exist_ok=True, symlinks=True)
    return project


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A model and the URL of vLLM's own server of it."""
    folder = make_model(tmp_path_factory.mktemp("served"), eos_token_id=7)  # not the tokenizer's
    with vllm_serving(folder, tmp_path_factory.mktemp("log") / "server.txt") as url:
        yield folder, url
