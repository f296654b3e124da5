import numpy as np
import pytest

from cpo_pipe.eval.metrics.text import chrf, distinct_n, ends_in_loop, rep_n, self_bleu


def test_rep_4_counts_repeated_four_grams() -> None:
    # 1234 2341 3412 4123 1234: five 4-grams, four distinct.
    assert rep_n([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)


def test_a_loop_repeats_nearly_everything() -> None:
    assert rep_n([7] * 13) == pytest.approx(1 - 1 / 10)


@pytest.mark.parametrize("text", [[], [1, 2, 3], [1, 2, 3, 4]])
def test_short_or_fresh_text_repeats_nothing(text: list[int]) -> None:
    assert rep_n(text) == 0


def test_distinct_2_is_over_all_texts_together() -> None:
    # 12 23 | 12 24: four 2-grams, three distinct.
    assert distinct_n([[1, 2, 3], [1, 2, 4]]) == pytest.approx(3 / 4)
    assert distinct_n([[1], []]) == 0


def test_chrf_by_hand() -> None:
    # "ab" against "ac": 1-grams share 1 of 2 on each side, 2-grams 0 of 1; longer n-grams exist on neither side and are
    # left out. Mean precision = mean recall = (1/2 + 0) / 2 = 1/4, so F2 = 1/4.
    np.testing.assert_allclose(chrf(["same text", "", "ab"], ["same text", "target", "ac"]), [100, 0, 25], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ([1, 2, 1, 2, 1, 2], True),
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1], True),  # cut within the phrase
        ([7] * 6, True),  # a phrase of two tokens, three times
        ([7] * 5, False),
        ([1, 2, 1, 2], False),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 4], False),  # it went on
        ([1, 2, 1, 2, 9, 1, 2], False),
        ([], False),
    ],
)
def test_a_loop_is_a_phrase_three_times_at_the_end(text: list[int], loops: bool) -> None:
    assert ends_in_loop(text) is loops


def test_loops_are_those_that_every_phrase_length_tried_finds() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        text = random.integers(2, size=random.integers(20)).tolist()
        found = any(text[len(text) - 3 * n :] == text[len(text) - n :] * 3 for n in range(2, len(text) // 3 + 1))
        assert ends_in_loop(text) == found


def test_distinct_1_and_3_by_hand() -> None:
    assert distinct_n([[1, 2, 1], [1]], 1) == pytest.approx(2 / 4)
    assert distinct_n([[1, 2, 3, 1, 2, 3]], 3) == pytest.approx(3 / 4)  # 123 231 312 123


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["a b c d", "a b c d", "a b c d"]) == pytest.approx(100)
    assert self_bleu(["a b", "c d"]) == 0
    # Each against the two others: "a b" has both 1-grams and the 2-gram of "a b c", and is a word shorter than it, but
    # no shorter than the nearest, "d e": 100. "a b c": 2 of 3 1-grams, 1 of 2 2-grams, no 3-gram (half of one, by the
    # smoothing), of no less length: cube root of 2/3 · 1/2 · 1/2. "d e": nothing.
    expected = (100 + 100 * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3) + 0) / 3
    assert self_bleu(["a b", "a b c", "d e"]) == pytest.approx(expected)
