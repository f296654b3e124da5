"""A store: its hashes and fingerprints, registered runs, and processes that share it."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import content_hash, model_fingerprint, row_seed
from cpo_pipe.data.store import Store


def test_a_hash_depends_on_the_spec_and_not_on_its_spelling() -> None:
    assert content_hash({"a": 1, "b": [2, "x"]}) == content_hash({"b": [2, "x"], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash({"a": 1}) != content_hash({"a": 1, "b": None})


@given(st.integers(0, 2**31), st.text())
def test_seeds_leave_room_for_samples_and_stay_below_the_limit(seed: int, example: str) -> None:
    first = row_seed(seed, example)
    assert first % (1 << 16) == 0
    assert 0 <= first < 2**61
    assert first == row_seed(seed, example)
    assert first != row_seed(seed + 1, example)


def test_a_fingerprint_depends_on_the_content_of_a_model(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def fingerprint(name: str, weights: bytes, **config: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        (folder / "model.safetensors").write_bytes(weights)
        return model_fingerprint(folder, store.hash_file)

    one = fingerprint("one", b"w" * 10)
    assert fingerprint("other-name", b"w" * 10, transformers_version="9") == one
    assert fingerprint("one", b"v" * 10) != one  # same name, different weights
    assert fingerprint("one", b"w" * 10, rope_theta=5) != one
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        model_fingerprint(tmp_path / "one", store.hash_file)


def test_a_run_registers_the_artifacts_that_it_opened(tmp_path: Path) -> None:
    def registered() -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (tmp_path / ".runs").glob("*")]

    store = Store(tmp_path)
    first = store.rows("groups", {"a": 1}).name
    second = store.artifact("checkpoints", {"a": 1}).name
    assert store.used == {first, second}
    store.register_run(tmp_path / "run")
    expected = {"run_dir": str(tmp_path / "run"), "host": socket.gethostname()}
    assert registered() == [{**expected, "artifacts": sorted([first, second])}]
    later = Store(tmp_path)
    third = later.rows("groups", {"a": 2}).name
    later.register_run(tmp_path / "run")
    assert registered() == [{**expected, "artifacts": sorted([first, second, third])}]
    later.register_run(tmp_path / "other")
    assert len(registered()) == 2


def test_a_store_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--store .*file.*cannot be made"):
        Store(tmp_path / "file")
