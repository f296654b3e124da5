import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.pipeline.prepare.leakage import LEAKAGE, find_leaks, leakage_warnings
from cpo_pipe.pipeline.prepare.near_duplicates import near_duplicate_groups
from tests.support.texts import changed, excerpt, text


def leaks(train, test, validation=(), part="prompt"):
    texts = [*train, *validation, *test]
    held = len(train) + len(validation)
    splits = {"train": range(len(train)), "validation": range(len(train), held), "test": range(held, len(texts))}
    column = pa.chunked_array([texts[:5], texts[5:]], pa.string())
    sources = pa.chunked_array([[f"a.jsonl:{place + 1}" for place in range(len(texts))]])
    return find_leaks(part, column, sources, splits, near_duplicate_groups(part, column, 0.5))


def counts(found, row=0):
    return tuple(found.figures[row][kind] for kind in ("examples", "equal", "near_duplicates", "ngrams", "n", "short"))


TRAIN = [text(seed) for seed in range(200)]
UNRELATED = [text(seed) for seed in range(1000, 1080)]
PLANTED = [
    *(TRAIN[n].title() + "." for n in range(3)),  # equal
    *(changed(TRAIN[n], 10, 30) for n in range(10, 14)),  # near-duplicates
    *(excerpt(TRAIN[n], 2000 + n, 7, 13) for n in range(20, 25)),  # 13 words in a row
    *(excerpt(TRAIN[n], 3000 + n, 7, 12) for n in range(30, 36)),  # 12: too few
]


@pytest.mark.parametrize("part", ["prompt", "target"])
def test_planted_leaks_are_all_found_and_no_others(part):
    found = leaks(TRAIN, [*UNRELATED, *PLANTED], part=part)
    assert counts(found) == (98, 3, 4, 5, 13, 0)
    held = {n: 280 + place for place, n in enumerate([0, 1, 2, *range(10, 14), *range(20, 25)])}
    kinds = {**dict.fromkeys(range(3), "equal"), **dict.fromkeys(range(10, 14), "near-duplicate"),
             **dict.fromkeys(range(20, 25), "n-gram")}  # fmt: skip
    assert found.training == {n: (kinds[n], held[n]) for n in held}
    assert found.figures[0]["example"] == "a.jsonl:281 (equal: a.jsonl:1)"
    assert pa.Table.from_pylist(found.figures, LEAKAGE).to_pylist() == found.figures


def test_each_split_is_compared_and_each_example_counts_once():
    found = leaks(TRAIN, PLANTED[:1], validation=[UNRELATED[0], PLANTED[3], PLANTED[0], TRAIN[11]])
    assert [row["split"] for row in found.figures] == ["validation", "test"]
    assert counts(found, 0) == (4, 2, 1, 0, 13, 0)
    assert counts(found, 1) == (1, 1, 0, 0, 13, 0)
    assert found.training[0][0] == "equal"
    assert found.training[11][0] == "equal"


def test_common_phrases_are_no_leaks():
    phrase = " ".join(text(1).split()[:20])
    for number, expected in ((10, 1), (11, 0)):
        train = [f"{text(500 + n)} {phrase}" for n in range(number)]
        found = leaks(train, [f"{text(600)} {phrase}", text(601)])
        assert counts(found)[3] == expected
        assert len(found.training) == number * expected


def test_formulas_do_not_count_as_words():
    train = [f"{text(1)} 48/2 = <<48/2=24>>24 + 6 = <<24+6=30>>30"]
    assert counts(leaks(train, [f"{text(2)} 48/2 = <<48/2=24>>24 + 6 = 30"]))[3] == 0


def test_short_texts():
    """The n-grams are as long as all but the shortest 5% of the held-out texts, but 8 to 13 words."""
    train = ["Yes, it is.", *(text(n, 10) for n in range(40))]
    test = ["yes it is", *(f"{' '.join(text(n, 10).split()[:9])} z" for n in range(19)), text(100, 9)]
    assert counts(leaks(train, test)) == (21, 1, 0, 19, 9, 1)
    found = leaks(train, test, part="target")
    assert counts(found) == (21, 0, 0, 19, 9, 1), "short targets are equal by nature"
    assert 0 not in found.training
    assert counts(leaks(train, [text(n, 5) for n in range(9)]))[4:] == (8, 9)


def test_nothing_to_compare():
    assert leaks(TRAIN, []).figures == []
    assert leaks([], TRAIN).figures == []


def test_without_the_training_examples_that_overlap_nothing_does():
    found = leaks(TRAIN, [*UNRELATED, *PLANTED])
    left = [one for place, one in enumerate(TRAIN) if place not in found.training]
    assert len(left) == len(TRAIN) - 12
    assert counts(leaks(left, [*UNRELATED, *PLANTED]))[1:4] == (0, 0, 0)


def test_warnings_name_what_overlaps_an_example_and_the_remedy():
    few = leaks(TRAIN, [*UNRELATED, *UNRELATED[:60], PLANTED[0]])
    assert list(leakage_warnings(few.figures)) == [], "1 of 141"
    (sentence,) = leakage_warnings(leaks(TRAIN, [*UNRELATED, *PLANTED]).figures)
    assert sentence == (
        "12 of 98 prompts of the test split overlap with training examples (3 equal, 4 near-duplicates, 5 others with "
        "13 words in a row), for example a.jsonl:281 (equal: a.jsonl:1): results on them may show what was memorized; "
        "set data.drop_leaks to true to remove these training examples"
    )


def test_groups_are_of_all_texts():
    """A held-out text in a chain with a training text is one of its near-duplicates."""
    chain = [text(0)]
    for step in range(1, 4):
        chain.append(changed(chain[-1], *range(step * 6, step * 6 + 6)))
    found = leaks([chain[0], *TRAIN[1:10]], chain[2:3], validation=chain[1:2])
    assert counts(found, 0)[2] == 1
    assert counts(found, 1)[2] == 1
    assert np.all([kind == "near-duplicate" for kind, _ in found.training.values()])
