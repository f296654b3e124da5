import numpy as np
import pytest

from cpo_pipe.eval.text_metrics import chrf, distinct_n, rep_n


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
