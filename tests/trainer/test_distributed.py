"""What each of several processes does, told which one it is; end_to_end/test_distributed.py starts real ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cpo_pipe.trainer import distributed


@pytest.mark.parametrize("is_main", [True, False])
def test_all_make_what_the_main_process_misses_and_it_alone_locks(
    monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    events: list[str] = []

    class Output:
        @contextmanager
        def lock(self) -> Iterator[None]:
            events.append("lock")
            yield
            events.append("release")

    own, mains = ["own"], iter([["first"], ["second"]])
    monkeypatch.setattr("cpo_pipe.data.execution.processes.is_main", lambda: is_main)
    monkeypatch.setattr(distributed, "agreed", lambda answer: next(mains) if answer is own else None)
    monkeypatch.setattr(distributed, "wait", lambda: events.append("wait"))
    assert distributed.make_missing(lambda: own, lambda missing: events.append(f"make {missing[0]}"), Output())
    assert events == (["lock", "make second", "wait", "release"] if is_main else ["make second", "wait"])


def test_one_process_alone_needs_nobody() -> None:
    class Output:
        @contextmanager
        def lock(self) -> Iterator[None]:
            raise AssertionError("nothing is missing")

    assert not distributed.make_missing(lambda: [], lambda _: None, Output())
