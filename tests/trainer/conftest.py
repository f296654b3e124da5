"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest

from tests.support.training import Bench


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    """A store with small groups and a tiny model."""
    return Bench(tmp_path, tiny_model)
