"""Identity of a selection."""

from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.examples import selection_hash


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


def test_the_addresses_of_trainings_stay() -> None:
    assert selection_hash(examples(2)) == "ddda4f57a3965ec0d6b1225f66ee1ffe"
