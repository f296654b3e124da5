"""Where two specs differ."""

from collections.abc import Iterator
from typing import Any

from cpo_pipe.data.fingerprint import canonical_json

ABSENT = object()
"""The value, in a difference, of the side that lacks the key or item."""


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and both values of each place where two JSON values differ, as deep as both go."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and any(isinstance(value, dict | list) for value in [*a, *b]):
        for place in range(max(len(a), len(b))):
            one, other = (values[place] if place < len(values) else ABSENT for values in (a, b))
            yield from differences(one, other, f"{path}[{place}]")
    elif ABSENT in (a, b) or canonical_json(a) != canonical_json(b):  # 1 and 1.0 have different hashes
        yield path, a, b
