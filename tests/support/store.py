"""Rows and artifacts of a store, and crashes while it writes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.store import Rows, Store, atomic

SPEC = {"model": "m", "dtype": "float32"}


def row(example: str, candidate: str = "c", value: float = 0.0) -> dict[str, Any]:
    return {"example_id": example, "candidate_id": candidate, "logprob": value, "num_tokens": 1}


def keys(*pairs: tuple[str, str]) -> pa.Table:
    return pa.table({"example_id": [e for e, _ in pairs], "candidate_id": [c for _, c in pairs]})


def rows_of(root: Path) -> Rows:
    """As another process would see them: nothing cached."""
    return Store(root).rows("reference-logprobs", SPEC)


def values(rows: Rows, *examples: str) -> list[tuple[str, str, float]]:
    table = rows.read(examples)
    return list(zip(*(table[name].to_pylist() for name in ("example_id", "candidate_id", "logprob")), strict=True))


def write(rows: Rows, *content: dict[str, Any]) -> None:
    """Append rows under the lock, as a stage does."""
    with rows.lock(), rows.writer() as writer:
        writer.add(content)


def manifest_of(shard: Path) -> Path:
    """Return the path of a shard's manifest."""
    return shard.parents[1] / "manifests" / f"{shard.stem}.json"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Crash(BaseException):
    """Stands for the process dying: nothing in the code under test may catch it and carry on."""


def crash_at(monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """Make the `point`-th operation on the disk fail half way."""
    count = 0
    dead = False

    def guarded(real: Callable[..., Any], half: Callable[..., None]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal count, dead
            if dead:
                return None  # a killed process cleans nothing up either
            count += 1
            if count == point:
                dead = True
                half(*arguments)
                raise Crash
            return real(*arguments, **options)

        return operation

    def half_write(path: Path, content: bytes) -> None:
        path.open("wb").write(content[: len(content) // 2])

    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(atomic.os, "fsync", guarded(os.fsync, nothing))
    monkeypatch.setattr(atomic.os, "replace", guarded(os.replace, nothing))
    monkeypatch.setattr(Path, "write_bytes", guarded(Path.write_bytes, half_write))
    monkeypatch.setattr(Path, "unlink", guarded(Path.unlink, nothing))


def make(store: Store, content: str) -> None:
    artifact = store.artifact("checkpoints", {"p": 1})
    with artifact.lock(), artifact.create() as writer:
        (writer.path / "weights").write_text(content)
        writer.facts["max_steps"] = 3
