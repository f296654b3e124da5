import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import digest
from cpo_pipe.pipeline.prepare.prepare import prepare
from cpo_pipe.pipeline.prepare.split import split_ends
from tests.support.ground_truth import by_split, data, jsonl, pairs

prompts = st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=12, max_size=60)


def sides(rows, train, validation=0, test=None, seed=0):
    """Rows (prompts, perhaps equal) by split, ordered by the hash of (seed, prompt) as design §4 has it."""
    ordered = sorted(rows, key=lambda row: digest([seed, row]))
    first, second, third = split_ends([digest([seed, row]) for row in ordered], train, validation, test)
    return ordered[:first], ordered[first:second], ordered[second:third]


@given(prompts, st.integers(1, 6), st.integers(0, 4))
def test_equal_prompts_stay_on_one_side(rows, train, validation):
    try:
        parts = sides(rows, train, validation)
    except InputError as error:
        assert "is left for data.validation" in str(error)  # noqa: PT017
        return
    assert len(parts[0]) >= train
    assert sum(map(len, parts)) == len(rows)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(parts[one]) & set(parts[other])


@given(st.sets(st.text(max_size=8), min_size=20, max_size=60), st.integers(1, 19), st.integers(0, 5))
def test_adding_rows_moves_none_but_at_the_boundary(texts, train, seed):
    rows = sorted(texts)
    old, new = rows[:-10], rows
    train = min(train, len(old))
    before, _, _ = sides(old, train, seed=seed)
    after, _, _ = sides(new, train, seed=seed)
    assert len(before) == len(after) == train
    assert set(after) - set(before) <= set(new) - set(old)  # no row came over from the test side
    assert len(set(before) - set(after)) <= 10
    assert before == sides(old[::-1], train, seed=seed)[0]


def test_boundary_moves_behind_equal_prompts():
    assert split_ends("aabbbc", 1, 0, None) == (2, 2, 6)
    assert split_ends("aabbbc", 3, 1, None) == (5, 6, 6)
    assert split_ends("abcdef", None, 1, 2) == (3, 4, 6)
    assert split_ends("abcdef", 2, 1, 2) == (2, 3, 5)  # what is left over is in no split
    assert split_ends("abcdef", 2, 1, 10) == (2, 3, 6)  # as many as there are
    assert split_ends("abcdef", 6, 0, None) == (6, 6, 6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((5, 2, None), r"data\.train 5 \+ data\.validation 2: only 6 rows are left to split"),
        ((None, 2, 4), r"data\.validation 2 \+ data\.test 4: only 6 rows are left to split"),
        ((6, 0, 3), r"data\.train 6 \+ data\.test 3: no row of 6 is left for data\.test"),
        ((3, 3, 1), r"data\.train 3 \+ data\.validation 3 \+ data\.test 1: no row of 6 is left for data\.test"),
    ],
)
def test_splits_that_cannot_be_filled(numbers, message):
    with pytest.raises(InputError, match=message):
        split_ends("abcdef", *numbers)


def test_order_is_fixed_by_seed_and_prompt_not_by_the_source(tmp_path, store, byte_tokenizer):
    rows = [*pairs(30), {"prompt": "question 3", "target": "another answer"}]
    one, other = jsonl(tmp_path / "1.jsonl", rows), jsonl(tmp_path / "2.jsonl", rows[::-1])
    shared = {"tokenizer": byte_tokenizer, "train": 10, "validation": 5, "test": 8}
    splits = [by_split(prepare(data(source=s, **shared), store), "example_id") for s in (one, other)]
    assert splits[0] == splits[1]
    prepared = by_split(prepare(data(source=one, **shared), store))
    in_order = prepared["train"] + prepared["validation"] + prepared["test"]
    assert in_order == sorted(in_order, key=lambda prompt: digest([0, prompt]))
    assert by_split(prepare(data(source=one, **shared, split_seed=1), store))["train"] != prepared["train"]
