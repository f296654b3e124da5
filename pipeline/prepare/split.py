"""The split into train, validation and test: by the hash of the prompt, so that equal prompts are in one split."""

from collections.abc import Sequence

from cpo_pipe.data.errors import InputError

SPLITS = ("train", "validation", "test")


def split_ends(
    prompt_hashes: Sequence[str], train: int | None, validation: int, test: int | None
) -> tuple[int, int, int]:
    """Return where the train, validation and test splits end among examples ordered by the hash of their prompt.

    A boundary between equal prompts moves to the last of them.

    Args:
        prompt_hashes: of the examples, in order.
        train: size of the split; None: what is left.
        validation: size of the split.
        test: size of the split; None: what is left.

    Raises:
        InputError: there are fewer rows than asked for training and validation, or a split that was asked for is empty.
    """
    rows = len(prompt_hashes)
    asked = {"train": train, "validation": validation, "test": test}
    wanted = " + ".join(f"data.{name} {number:,}" for name, number in asked.items() if number)
    if train is None:
        train = rows - validation - (test or 0)
    if train < 1 or rows < train + validation:
        raise InputError(f"{wanted}: only {rows:,} rows are left to split; ask for fewer, or give more rows")
    train_end = _behind_equals(prompt_hashes, train)
    validation_end = _behind_equals(prompt_hashes, min(train_end + validation, rows))
    test_end = rows if test is None else min(validation_end + test, rows)
    for name, size in (("validation", validation_end - train_end), ("test", test_end - validation_end)):
        if asked[name] and not size:
            raise InputError(f"{wanted}: no row of {rows:,} is left for data.{name}; ask for fewer, or give more rows")
    return train_end, validation_end, test_end


def _behind_equals(ordered: Sequence[str], end: int) -> int:
    while 0 < end < len(ordered) and ordered[end - 1] == ordered[end]:
        end += 1
    return end
