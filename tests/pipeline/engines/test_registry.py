"""Engines by name and by import path: what is refused when a recipe is read, and what `auto` takes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cpo_pipe.data.config import Section
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.model import Model
from cpo_pipe.pipeline.engines.base import Engine, Request, Sample, Sampling
from cpo_pipe.pipeline.engines.registry import ENGINES, EngineName, choose_engine
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from cpo_pipe.pipeline.engines.vllm import VllmEngine

MODEL = Model("m", Path("nowhere"), "0" * 32)

USERS = """
from cpo_pipe.pipeline.engines.base import Engine, LogprobEngine

class Mine(Engine):
    "My own."
    description = "mine"
    def __init__(self, model, context=None, dtype="auto"): pass
    def generate(self, requests, sampling): yield from ()

class Nameless(Engine):
    "It does not say what it is."
    def __init__(self, model, context=None, dtype="auto"): pass
    def generate(self, requests, sampling): yield from ()

class Silent(Mine, LogprobEngine):
    "It claims to give log-probs."

class Contextless(Mine):
    "It cannot be opened."
    def __init__(self, model): pass

class Undescribed(Mine):
    pass

def function(model, context=None): pass
"""


@pytest.fixture(autouse=True)
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's own, `users_engines`."""
    (tmp_path / "users_engines.py").write_text(USERS)
    monkeypatch.syspath_prepend(str(tmp_path))


class Settings(Section):
    engine: EngineName = "auto"


@pytest.mark.parametrize("name", ["auto", "vllm", "transformers", "users_engines:Mine"])
def test_known_names_and_import_paths_stay_as_they_are(name: str) -> None:
    settings = Settings.model_validate({"engine": name})
    assert settings.model_dump(mode="json", exclude_unset=True) == {"engine": name}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vlm", "unknown engine 'vlm'; did you mean vllm?"),
        ("aut", "unknown engine 'aut'; did you mean auto?"),
        ("trt", "unknown engine 'trt'; choose from vllm, transformers, or name a class as module:Class"),
        ("users_engines:Mien", "engine users_engines:Mien cannot be imported (module 'users_engines' has no attribute"),
        ("nowhere:Mine", "engine nowhere:Mine cannot be imported (No module named 'nowhere')"),
        ("users_engines:Nameless", "engine users_engines:Nameless is incomplete; implement description"),
        ("users_engines:Silent", "engine users_engines:Silent is incomplete; implement next_logprobs"),
        ("users_engines:Engine", "is incomplete; implement __init__, description, generate"),
        (
            "users_engines:Contextless",
            "engine users_engines:Contextless: __init__ must take the model, the context and the dtype (",
        ),
        ("users_engines:Undescribed", "engine users_engines:Undescribed has no docstring; describe it in one line"),
        (
            "users_engines:function",
            "engine users_engines:function must be a subclass of cpo_pipe.pipeline.engines.base.Engine",
        ),
    ],
)
def test_what_is_no_engine_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate({"engine": name})
    (detail,) = refused.value.errors()
    assert detail["loc"] == ("engine",)
    assert message in detail["msg"]


class Searcher(Engine):
    """It needs nothing, supports everything and loads nothing."""

    beam_search = True
    description = "searcher"

    def __init__(self, model: Any, context: int | None = None, dtype: str = "auto"):
        raise AssertionError("only chosen, never opened")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        raise AssertionError("only chosen, never opened")


class Picky(Searcher):
    """It supports no model."""

    beam_search = False

    @classmethod
    def unsupported(cls, model: Model) -> str | None:
        return "architecture llama"


class Absent(Searcher):
    """It is not installed, so it cannot say what it supports."""

    beam_search = False

    @classmethod
    def not_installed(cls) -> str | None:
        return "pip install absent"

    @classmethod
    def unsupported(cls, model: Model) -> str | None:
        raise ModuleNotFoundError("absent")


@pytest.mark.parametrize(
    ("entries", "beam_search", "line"),
    [
        ({"one": Searcher, "two": Searcher}, False, "engine: one"),
        ({"one": Picky, "two": Searcher}, False, "engine: two (one does not support m: architecture llama)"),
        ({"one": Absent, "two": Searcher}, False, "engine: two (one is not installed)"),
        ({"one": Absent, "two": Picky, "three": Searcher}, False,
         "engine: three (one is not installed; two does not support m: architecture llama)"),
        ({"one": Absent, "two": Searcher}, True, "engine: two (beam search)"),
    ],
)  # fmt: skip
def test_auto_takes_the_first_that_can_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    entries: dict[str, type[Engine]],
    beam_search: bool,
    line: str,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(ENGINES, "entries", entries)
    assert choose_engine("auto", MODEL, beam_search) is Searcher
    assert caplog.messages == [line]


def test_an_engine_that_is_named_is_taken_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(ENGINES, "entries", {"one": Searcher, "picky": Picky, "absent": Absent})
    assert choose_engine("one", MODEL) is Searcher
    assert choose_engine("users_engines:Mine", MODEL).__name__ == "Mine"
    with pytest.raises(InputError, match=r"^engine is absent, which is not installed: pip install absent$"):
        choose_engine("absent", MODEL)
    with pytest.raises(
        InputError, match=r"^engine is picky, which does not support m \(architecture llama\); use engine"
    ):
        choose_engine("picky", MODEL)
    assert caplog.messages == []


def test_vllm_comes_before_transformers() -> None:
    assert [*ENGINES.entries.items()] == [("vllm", VllmEngine), ("transformers", TransformersEngine)]
