"""Rows: the unit of reuse, read by key."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import content_hash
from cpo_pipe.data.store import Rows, Store
from tests.support.store import SPEC, keys, row, rows_of, values, write


def test_rows_are_read_in_the_requested_order(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    write(rows, row("b", "1", 1), row("a", "2", 2))
    write(rows, row("c", "3", 3), row("a", "1", 4))
    assert values(rows, "a", "c", "b") == [("a", "1", 4), ("a", "2", 2), ("c", "3", 3), ("b", "1", 1)]
    assert values(rows, "b", "nowhere") == [("b", "1", 1)]
    assert [t.num_rows for t in rows.batches(["a", "b", "c"], size=2)] == [3, 1]


def test_contains_answers_each_key_in_order(tmp_path: Path) -> None:
    rows, reader = rows_of(tmp_path), rows_of(tmp_path)
    asked = keys(("b", "1"), ("a", "2"), ("a", "1"), ("b", "1"))
    assert reader.contains(asked).tolist() == [False] * 4
    write(rows, row("a", "1"))
    assert reader.contains(asked).tolist() == [False, False, True, False]
    write(rows, row("b", "1"))
    assert reader.contains(asked, refresh=False).tolist() == [False, False, True, False]
    assert reader.read(["b"], refresh=False).num_rows == 0
    assert reader.contains(asked).tolist() == [True, False, True, True]
    assert reader.contains(asked.slice(0, 0)).tolist() == []


def test_has_samples_answers_each_example_in_order(tmp_path: Path) -> None:
    rows = Store(tmp_path).rows("generations", {"a": 1})
    assert rows.has_samples(["a"], 2).tolist() == [[False, False]]
    columns = {"text": "t", "token_ids": [1], "finish_reason": "stop", "seed": 0, "engine": "e"}
    places = [("a", 0), ("a", 2), ("b", 1), ("a", 700)]
    with rows.writer() as writer:
        writer.add([{"example_id": name, "sample_index": k, **columns} for name, k in places])
    expected = [[False, True, False], [False] * 3, [True, False, True], [False, True, False]]
    asked = ["b", "nowhere", "a", "b"]
    for form in (asked, pa.array(asked), pa.chunked_array([asked[:1], asked[1:]])):
        found = rows.has_samples(form, 3)
        assert found.shape == (4, 3)
        assert found.tolist() == expected
    assert rows.has_samples([], 3).shape == (0, 3)
    assert rows.read(["a"])["sample_index"].to_pylist() == [0, 2, 700]


def test_rows_are_pickled_without_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = rows_of(Path("store"))
    write(rows, *[row(f"{number:04d}") for number in range(1000)])
    assert rows.num_rows() == 1000
    packed = pickle.dumps(rows)
    assert len(packed) < 500
    monkeypatch.chdir("/")
    arrived: Rows = pickle.loads(packed)
    assert arrived.name == rows.name
    assert arrived.num_rows() == 1000
    arrived.append(pa.Table.from_pylist([row("more")]))
    assert rows_of(tmp_path / "store").num_rows() == 1001


def test_missing_keeps_the_order_and_omits_written_keys(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    wanted = keys(("z", "1"), ("a", "1"), ("m", "1"), ("a", "2"))
    assert rows.missing(wanted).to_pylist() == wanted.to_pylist()
    write(rows, row("a", "1"))
    assert rows.missing(wanted).to_pylist() == keys(("z", "1"), ("m", "1"), ("a", "2")).to_pylist()
    write(rows, row("z", "1"), row("m", "1"), row("a", "2"))
    assert rows.missing(wanted).num_rows == 0
    assert rows_of(tmp_path).missing(wanted).num_rows == 0


def test_the_first_of_two_equal_keys_wins_and_is_counted_once(tmp_path: Path) -> None:
    first, second = rows_of(tmp_path), rows_of(tmp_path)
    write(first, row("a", value=1), row("b", value=1))
    write(second, row("a", value=2), row("c", value=2))
    for reader in (first, second, rows_of(tmp_path)):
        assert values(reader, "a", "b", "c") == [("a", "c", 1), ("b", "c", 1), ("c", "c", 2)]
        assert reader.num_rows() == 3


def test_one_shard_never_holds_a_key_twice(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="duplicate row key"):
        rows_of(tmp_path).append(pa.Table.from_pylist([row("a"), row("a")]))


def test_a_null_in_a_required_column_is_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    with pytest.raises(RunError, match="schema"):
        rows.append(pa.Table.from_pylist([row("a") | {"logprob": None}]))
    assert rows.num_rows() == 0


def test_the_spec_is_written_beside_the_shards(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    write(rows, row("a"))
    assert json.loads((rows.path / "spec.json").read_text()) == SPEC
    assert rows.path.name == content_hash(SPEC)


def test_collected_rows_survive_an_error(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)

    def interrupted() -> None:
        with rows.lock(), rows.writer() as writer:
            writer.add([row("a", value=7)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert values(rows_of(tmp_path), "a") == [("a", "c", 7)]


def test_reasons_are_recorded_before_what_they_explain(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cause, effect = store.rows("reference-logprobs", {"a": 1}), store.rows("reference-logprobs", {"b": 1})
    with cause.writer() as first, effect.writer(after=first) as second:
        first.add([row("a")])
        second.add([row("a")])
        second.flush()
        assert cause.num_rows() == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("12")), unique=True), max_size=5))
def test_rows_behave_like_a_dictionary_that_keeps_the_first_value(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[str, str]]]
) -> None:
    rows = rows_of(tmp_path_factory.mktemp("store"))
    expected: dict[tuple[str, str], float] = {}
    for number, shard in enumerate(shards):
        rows.append(pa.Table.from_pylist([row(*pair, value=number) for pair in shard], schema=rows.schema))
        for pair in shard:
            expected.setdefault(pair, float(number))
    everything = [(e, c) for e in "abcdef" for c in "12"]
    assert rows.missing(keys(*everything)).num_rows == len(everything) - len(expected)
    assert values(rows, *"abcdef") == [(*pair, expected[pair]) for pair in everything if pair in expected]
