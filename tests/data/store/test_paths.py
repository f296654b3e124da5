"""Where a store is."""

from pathlib import Path

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.store import Store
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.store.paths import local_folder, open_root


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_root("~/store") == open_root("file://~/store") == home / "store"
    assert Store("~/store").root == Inventory("~/store").root == home / "store"
    monkeypatch.setenv("CPO_PIPE_CACHE", "~/cache")
    assert local_folder(open_root("memory://bucket/x")).is_relative_to(home / "cache")
    assert not any(Path().iterdir())


@pytest.mark.parametrize("root", ["", " ", "file://"])
def test_an_empty_root_does_not_fill_the_current_folder(root: str) -> None:
    for opened in (Store, Inventory):
        with pytest.raises(InputError, match="--store is empty, which would mean the current folder; name a folder"):
            opened(root)
    assert not any(Path().iterdir())


def test_the_home_of_no_user_is_an_error() -> None:
    with pytest.raises(InputError, match="--store ~nobody-at-all/x: no such user; for a folder of that name give"):
        open_root("~nobody-at-all/x")
