"""Fixtures of the tests of evaluations."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.evaluation import Bench


@pytest.fixture(scope="module")
def models(new_model: Callable[..., Path]) -> dict[str, Path]:
    """The folders of two tiny models."""
    return {"one": new_model(seed=1), "two": new_model(seed=2)}


@pytest.fixture
def bench(tmp_path: Path, models: dict[str, Path]) -> Bench:
    """Two models and twelve test examples in a store."""
    return Bench(tmp_path / "store", models, 12)
