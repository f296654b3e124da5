"""Identity of a selection."""

from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.examples import draw, selection_hash


def examples(count: int) -> pa.Table:
    return pa.table(
        {
            "example_id": [f"e{number}" for number in range(count)],
            "target": ["no part of it"] * count,
            "prompt_ids": pa.array([[number] * (number % 5) for number in range(count)], pa.list_(pa.int32())),
            "target_ids": pa.array([[7, number] for number in range(count)], pa.list_(pa.int32())),
        }
    )


def test_the_hash_of_a_selection_is_that_of_its_rows_however_they_are_chunked() -> None:
    whole = examples(3000)
    expected = selection_hash(whole)
    assert selection_hash(pa.concat_tables([whole.slice(0, 1), whole.slice(1, 2000), whole.slice(2001)])) == expected
    assert selection_hash(whole.drop(["target"])) == expected
    assert selection_hash(whole.slice(0, 2999)) != expected
    assert selection_hash(whole.take(list(range(2999, -1, -1)))) != expected


def ids(table: pa.Table) -> list[str]:
    found: list[str] = table["example_id"].to_pylist()
    return found


def test_a_draw_depends_on_neither_order_nor_size() -> None:
    whole = examples(1000)
    drawn = draw(whole, 100, seed=1)
    assert len({*ids(drawn)}) == 100
    assert ids(drawn) == [one for one in ids(whole) if one in {*ids(drawn)}], "in the order of the whole"
    turned = draw(whole.take(list(range(999, -1, -1))), 100, seed=1)
    assert ids(turned) == ids(drawn)[::-1]
    assert {*ids(draw(whole, 40, seed=1))} < {*ids(drawn)} < {*ids(draw(whole, 101, seed=1))}
    assert {*ids(draw(whole.slice(0, 900), 100, seed=1))} >= {*ids(drawn)} & {*ids(whole.slice(0, 900))}


def test_a_draw_is_by_chance() -> None:
    """Two draws of 100 of 1,000 share 10 ± 2.8 examples; of the 1,000 of ten draws 500 ± 15 are of the first half."""
    draws = [ids(draw(examples(1000), 100, seed)) for seed in range(10)]
    assert 0 < len({*draws[0]} & {*draws[1]}) < 25
    assert 420 < sum(int(one[1:]) < 500 for drawn in draws for one in drawn) < 580


def test_a_draw_of_more_than_there_are_is_all_of_them() -> None:
    assert ids(draw(examples(3), 9, seed=0)) == ["e0", "e1", "e2"]
    assert draw(examples(0), 9, seed=0).num_rows == 0


@pytest.mark.parametrize(
    "other",
    [
        {"example_id": ["ab", "c"], "prompt_ids": [[1], [2]], "target_ids": [[3], [4]]},
        {"example_id": ["a", "bc"], "prompt_ids": [[1, 2], []], "target_ids": [[3], [4]]},
        {"example_id": ["a", "bc"], "prompt_ids": [[1], [2]], "target_ids": [[3, 4], []]},
        {"example_id": ["a", "bc"], "prompt_ids": [[1], [3]], "target_ids": [[2], [4]]},
    ],
)
def test_what_stands_in_another_row_or_column_is_another_selection(other: dict[str, Any]) -> None:
    one = {"example_id": ["a", "bc"], "prompt_ids": [[1], [2]], "target_ids": [[3], [4]]}
    ids = pa.list_(pa.int32())
    schema = pa.schema([("example_id", pa.string()), ("prompt_ids", ids), ("target_ids", ids)])
    assert selection_hash(pa.table(one, schema=schema)) != selection_hash(pa.table(other, schema=schema))


def test_the_hashes_of_trainings_stay() -> None:
    assert selection_hash(examples(2)) == "ddda4f57a3965ec0d6b1225f66ee1ffe"
