"""The index of row keys is a dictionary in which the first shard's row stays, however it was put together."""

import random

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_pipe.data.store import index as index_module
from cpo_pipe.data.store.index import Index, Keys

Pair = tuple[str | None, str]

# Of all lengths, also beyond ASCII, and none at all, as `rejected` has it.
IDS = ["a", "bb", "c" * 9, "é", "d" * 40, "e" * 32, "f" * 32, None]
RESTS = ["1", "x" * 9, "y" * 8, "y" * 16, "ß", "z" * 20]


def table(pairs: list[Pair]) -> pa.Table:
    ids, rests = ([pair[part] for pair in pairs] for part in (0, 1))
    return pa.table({"example_id": pa.array(ids, pa.string()), "candidate_id": pa.array(rests, pa.string())})


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text("0123456789", min_size=1, max_size=4),
        st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(RESTS)), unique=True, min_size=1, max_size=9),
        max_size=6,
    ),
    st.integers(0, 99),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_like_a_dictionary(shards: dict[str, list[Pair]], seed: int, together: int, gone: int) -> None:
    names = sorted(shards)
    random.Random(seed).shuffle(names)  # a shard may turn up that sorts before what is known
    index = Index.empty()
    for start in range(0, len(names), together):
        index = index.merged({name: Keys.of(table(shards[name])) for name in names[start : start + together]})
    index = index.without(set(names[:gone]))
    expected: dict[Pair, tuple[str, int]] = {}
    for name in sorted(names[gone:]):
        for row, pair in enumerate(shards[name]):
            expected.setdefault(pair, (name, row))
    assert index.shards == sorted(names[gone:])
    assert index.num_keys() == len(expected)
    asked: list[Pair] = [(name, rest) for name in [*IDS, "nowhere"] for rest in [*RESTS, "other"]]
    assert index.contains(table(asked)).tolist() == [pair in expected for pair in asked]
    ids = [*IDS, "nowhere", "a"]
    which, at = index.rows_of(pa.chunked_array([pa.array(ids, pa.string())]))
    found = [(int(w), index.shards[index.shard[p]], int(index.row[p])) for w, p in zip(which, at, strict=True)]
    assert [w for w, _, _ in found] == sorted(w for w, _, _ in found)
    assert sorted(found) == sorted(
        (w, *place) for w, name in enumerate(ids) for pair, place in expected.items() if pair[0] == name
    )


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), unique=True, max_size=30))
def test_a_hash_does_not_depend_on_its_neighbours(rests: list[str]) -> None:
    together = Keys.of(table([("a", rest) for rest in rests])).rest
    alone = [Keys.of(table([("a", rest)])).rest[0] for rest in rests]
    assert together.tolist() == alone
    assert len(set(alone)) == len(rests)


def test_hashes_of_several_columns_tell_them_apart() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("c", "ab")]
    columns = {"example_id": ["e"] * 5, "one": [one for one, _ in parts], "two": [two for _, two in parts]}
    assert len(set(Keys.of(pa.table(columns)).rest.tolist())) == 5


def test_hashes_of_hexadecimal_names_are_spread() -> None:
    names = [f"{number:032x}" for number in range(200_000)]
    hashed = Keys.of(table([("a", name) for name in names])).rest
    assert len(np.unique(hashed)) == len(names)
    for shift in (0, 16, 32, 48):
        counts = np.bincount(((hashed >> np.uint64(shift)) & np.uint64(255)).astype(np.int64), minlength=256)
        assert abs(counts / (len(names) / 256) - 1).max() < 0.25


def test_a_look_up_in_parts_is_the_same(monkeypatch: object) -> None:
    pairs: list[Pair] = [(f"{number % 7}", str(number)) for number in range(50)]
    index = Index.empty().merged({"1": Keys.of(table(pairs[::2]))})
    whole = index.contains(table(pairs))
    monkeypatch.setattr(index_module, "_TOGETHER", 7)  # type: ignore[attr-defined]
    assert index.contains(table(pairs)).tolist() == whole.tolist() == [number % 2 == 0 for number in range(50)]
