"""The engine that a run's samples are made with."""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline import samples
from cpo_pipe.pipeline.engines.base import Engine, Request, Sample, Sampling
from cpo_pipe.pipeline.engines.registry import ENGINES
from cpo_pipe.pipeline.engines.transformers import TransformersEngine
from cpo_pipe.pipeline.samples import LazyEngine

SAMPLED = Sampling(temperature=1.0, top_k=0, max_new_tokens=4, stop_ids=())
SEARCHED = Sampling(temperature=0, top_k=0, beams=3, max_new_tokens=4, stop_ids=())


class Sampler(Engine):
    """It samples, but has no beam search."""

    description = "sampler"

    def __init__(self, model: Any, context: int | None = None, dtype: str = "auto"):
        self.context, self.dtype = context, dtype

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        raise AssertionError("only opened, never asked")


def test_an_engine_without_beam_search_gives_way_to_transformers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(ENGINES, "entries", {"sampler": Sampler, "transformers": TransformersEngine})
    engine = LazyEngine("auto", locate_model(str(tiny_model), Store(tmp_path / "store")), 9, "bfloat16")
    first = engine(SAMPLED)
    assert isinstance(first, Sampler)
    assert (first.context, first.dtype) == (9, "bfloat16")
    assert pickle.loads(pickle.dumps(engine))(SAMPLED).dtype == "bfloat16"
    assert engine(SAMPLED) is first, "one engine for all samples"
    search = engine(SEARCHED)
    assert isinstance(search, TransformersEngine)
    assert "engine: transformers (beam search)" in caplog.text
    assert engine(SAMPLED) is engine(SEARCHED) is search


def test_an_engine_travels_unloaded(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "choose_engine", lambda *_: Sampler)
    engine = LazyEngine("auto", locate_model(str(tiny_model), Store(tmp_path / "store")), 9)
    loaded = engine(SAMPLED)
    copy = pickle.loads(pickle.dumps(engine))
    assert copy.model == engine.model
    other = copy(SAMPLED)
    assert other is not loaded
    assert other.context == 9
