"""Which parameters of a test are left to `just test-slow` or `just soak`."""

from collections.abc import Iterable
from typing import Any

import pytest


def soak_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """The values as parameters, all but `kept` left to `just soak`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.soak) for value in values]


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values (tuples for several names) as parameters, all but `fast` marked slow."""

    def parameter(value: Any) -> Any:
        values = value if isinstance(value, tuple) else (value,)
        return value if value in fast else pytest.param(*values, marks=pytest.mark.slow)

    return [parameter(value) for value in values]
