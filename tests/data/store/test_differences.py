"""Two specs differ where their canonical JSON does."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cpo_pipe.data.fingerprint import canonical_json
from cpo_pipe.data.store.differences import ABSENT, differences

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats(0, 2, width=16) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_equal_values_and_no_others_have_no_differences(a: Any, b: Any) -> None:
    assert list(differences(a, a)) == []
    assert bool(list(differences(a, b))) == (canonical_json(a) != canonical_json(b))


def test_differences_are_found_by_their_path() -> None:
    a = {"sampling": {"temperature": 1.0, "stop": [0]}, "parts": [{"count": 3}, {"count": 1}], "same": [1, {"x": None}]}
    b = {"sampling": {"temperature": 0.7, "stop": [0, 5]}, "parts": [{"count": 4}], "same": [1, {"x": None}], "new": 1}
    assert list(differences(a, b)) == [
        ("sampling.temperature", 1.0, 0.7),
        ("sampling.stop", [0], [0, 5]),
        ("parts[0].count", 3, 4),
        ("parts[1]", {"count": 1}, ABSENT),
        ("new", ABSENT, 1),
    ]
