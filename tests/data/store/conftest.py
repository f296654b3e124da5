"""Fixtures of the store's tests."""

from pathlib import Path

import pytest

from tests.support.inventory import checkpoint_of, rows_of, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a table of two shards and a checkpoint."""
    write(rows_of(tmp_path), "a", "b", "c")
    write(rows_of(tmp_path), "d")
    with checkpoint_of(tmp_path).lock(), checkpoint_of(tmp_path).create() as writer:
        (writer.path / "sub").mkdir()
        (writer.path / "sub/weights").write_bytes(b"12345")
        writer.facts["fingerprint"] = "f" * 32
    return tmp_path
