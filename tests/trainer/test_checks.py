"""The checks before a training's first step: each on a case made for it, and not on a healthy neighbour."""

import logging
from collections.abc import Sequence

import numpy as np
import pytest

from cpo_pipe.trainer.checks import ALONE, ALREADY_RIGHT, check_groups
from cpo_pipe.trainer.groups import Groups
from tests.support.architectures import table
from tests.support.training import said


@pytest.fixture(autouse=True)
def _all_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="cpo_pipe")


def check(*groups: tuple[Sequence[int], Sequence[float]]) -> None:
    """`check_groups` on groups given by their candidates' numbers of tokens and reference log-probs."""
    made = table([([1], [[2] * count for count in tokens]) for tokens, _ in groups])
    check_groups("t", Groups.of(made, np.concatenate([logprobs for _, logprobs in groups])), len(groups))


HARD = ([2, 2], [-9.0, -8.0])
"""The reference prefers the negative."""
EASY = ([2, 2], [-8.0, -9.0])
ALONE_GROUP = ([2], [-8.0])


def test_too_many_groups_without_negatives_are_said(caplog: pytest.LogCaptureFixture) -> None:
    assert ALONE == 0.2
    check(*[ALONE_GROUP] * 20, *[HARD] * 80)
    assert said(caplog) == []
    check(*[ALONE_GROUP] * 21, *[HARD] * 79)
    (message,) = said(caplog)
    assert "train t: 21% of the groups have no negative left (K = 1)" in message


def test_a_reference_that_is_right_already_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert ALREADY_RIGHT == 0.8
    check(*[EASY] * 80, *[HARD] * 20)
    assert said(caplog) == []
    check(*[EASY] * 81, *[HARD] * 19)
    (message,) = said(caplog)
    assert "puts the target first in 81% of the groups" in message


def test_groups_without_negatives_count_as_neither_right_nor_wrong(caplog: pytest.LogCaptureFixture) -> None:
    check(*[EASY] * 9, HARD, *[ALONE_GROUP] * 2)
    (message,) = said(caplog)
    assert "puts the target first in 90% of the groups" in message
    check(*[ALONE_GROUP] * 3)
    (message,) = said(caplog)
    assert "100% of the groups have no negative left" in message


def test_the_reference_is_right_by_log_prob_per_token_and_against_every_negative(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The sum of the target's log-probs is the lowest, its mean the highest.
    check(([10, 2, 1], [-10.0, -4.0, -3.0]))
    assert len(said(caplog)) == 1
    # The other way round.
    check(([1, 2, 10], [-3.0, -4.0, -10.0]))
    assert said(caplog) == []
    # One better negative is enough, and a tie is not right.
    check(([2, 2, 2], [-8.0, -9.0, -7.0]))
    check(([2, 2], [-8.0, -8.0]))
    assert said(caplog) == []
