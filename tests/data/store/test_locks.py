"""Making what is missing, once among all processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.data.store.locks import make_missing


class Output:
    """Records when its lock is taken and released."""

    def __init__(self, name: str, events: list[str]):
        self._name, self._events = name, events

    @contextmanager
    def lock(self) -> Iterator[None]:
        self._events.append(f"lock {self._name}")
        try:
            yield
        finally:
            self._events.append(f"release {self._name}")


def run(*answers: Any) -> tuple[Any, list[str]]:
    """What make_missing returns where `find` gives these answers, and what happens."""
    events: list[str] = []
    coming = iter(answers)

    def find() -> Any:
        events.append("find")
        return next(coming)

    made = make_missing(
        find, lambda missing: events.append(f"make {missing}"), Output("a", events), Output("b", events)
    )
    return made, events


@pytest.mark.parametrize(
    ("nothing", "missing"),
    [
        (False, True),
        ([], ["x"]),
        ({}, {"x": 1}),
        (np.array([False, False]), np.array([[False, True]])),
        (pa.table({"x": pa.array([], pa.string())}), pa.table({"x": [""]})),
    ],
)
def test_locks_are_taken_only_if_something_is_missing_and_it_is_made_only_if_it_still_is(
    nothing: Any, missing: Any
) -> None:
    assert run(nothing) == (None, ["find"])
    assert run(missing, nothing) == (None, ["find", "lock a", "lock b", "find", "release b", "release a"])
    made, events = run(missing, missing)
    assert made is missing
    assert events == ["find", "lock a", "lock b", "find", f"make {missing}", "release b", "release a"]


def test_what_is_made_is_what_is_missing_under_the_locks() -> None:
    assert run([1, 2], [2])[0] == [2]
