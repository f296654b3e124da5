"""Warnings of the known ways in which preference training goes wrong, said once when they show."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError
from cpo_pipe.trainer.groups import Groups
from cpo_pipe.trainer.tables import PAIR, Flags, Lengths

log = logging.getLogger(__name__)

DROP = 0.5
"""Nats per token that the target's log-prob may fall below the reference's; said again at every doubling."""
DROP_STEPS = 10
"""Steps that this is averaged over."""
ALREADY_RIGHT = 0.8
"""Share of groups whose target the reference prefers, per token, from which there is little to learn."""
ALONE = 0.2
"""Share of groups without a negative from which something is wrong with the negatives."""
REPETITION = 0.2
"""Rise of the share of repeated 4-grams in greedy samples."""


def check_groups(name: str, groups: Groups, total: int) -> None:
    """Say how many groups have K = 1, and warn of what the groups and the reference's log-probs show.

    Args:
        name: of the training, for messages.
        groups: all of the selection with K ≥ 2; what log π_ref shows is only said where they have it.
        total: groups of the selection, those of K = 1 too.
    """
    several_G = np.diff(groups.bounds) > 1
    alone = total - int(several_G.sum())
    if alone:
        log.info("train %s: %d of %d groups have K = 1 and have nothing to prefer", name, alone, total)
    if alone > ALONE * total:
        log.warning(
            "train %s: %.0f%% of the groups have no negative left (K = 1), and only an MLE loss sees them: "
            "the generator's samples equal the target or each other; a higher temperature makes others",
            name, 100 * alone / total,
        )  # fmt: skip
    if groups.reference_C is None:
        return
    right = _already_right(groups)[several_G].sum() / max(total - alone, 1)
    if right > ALREADY_RIGHT:
        log.warning(
            "train %s: by log-prob per token the reference already puts the target first in %.0f%% of the groups: "
            "little to learn; negatives of a better generator are harder",
            name, 100 * right,
        )  # fmt: skip


def check_pairs(name: str, groups: pa.Table, kinds: Sequence[tuple[str, str]], total: int) -> None:
    """Say how many pairs of each kind there are, and warn where many prompts have none.

    Args:
        name: of the training, for messages.
        groups: the pairs.
        kinds: what was asked for, by strategy.
        total: prompts of the selection.

    Raises:
        InputError: of a kind there is none.
    """
    prompts = pc.count_distinct(groups["example_id"]).as_py()
    counts = np.bincount(groups[PAIR].to_numpy(), minlength=len(kinds)).tolist()
    found = list(zip(counts, kinds, strict=True))
    shown = ", ".join(f"{count} of {chosen} over {rejected}" for count, (chosen, rejected) in found)
    log.info("train %s: %d pairs of %d of %d prompts: %s", name, groups.num_rows, prompts, total, shown)
    for count, (chosen, rejected) in found:
        if not count:
            raise InputError(
                f"train.{name}.pairs: there is no pair [{chosen}, {rejected}]: no prompt has both (a text that equals "
                "the target or one before it in its group is dropped); leave it out, or see to its texts"
            )
    if total - prompts > ALONE * total:
        log.warning(
            "train %s: %.0f%% of the prompts have none of the pairs, and are not trained on: a file may lack them, or "
            "their texts equal others of the group, which are dropped",
            name, 100 * (total - prompts) / total,
        )  # fmt: skip


def _already_right(groups: Groups) -> Flags:
    """Of each group whether the target's log-prob per token is above that of every negative."""
    assert groups.reference_C is not None
    per_token_C = groups.reference_C / Lengths.of(groups.table).candidate_C
    first = groups.bounds[:-1]
    target_G = per_token_C[first]
    per_token_C[first] = -np.inf
    right: Flags = target_G > np.maximum.reduceat(per_token_C, first)
    return right


class Watch:
    """Looks at the metrics of each step."""

    def __init__(self, name: str, metrics: Sequence[dict[str, float]]):
        """`metrics` are those of the steps already done; what they show was said when they were."""
        self._name = name
        self._silent = True
        self._drops: list[float] = []
        self._next_drop = DROP
        self._first_repetition: float | None = None
        self._said_repetition = False
        for row in metrics:
            self.step(row)
        self._silent = False

    def _warn(self, message: str, *values: object) -> None:
        if not self._silent:
            log.warning(message, *values)

    def step(self, row: dict[str, float]) -> None:
        """Warn of what the metrics of one more step show."""
        if row.get("target_drop_per_token") is not None:
            self._drop(row["step"], row["target_drop_per_token"])
        if row.get("repetition") is not None:
            self._repetition(row["step"], row["repetition"])

    def _drop(self, step: float, drop: float) -> None:
        self._drops = [*self._drops[-DROP_STEPS + 1 :], drop]
        mean = sum(self._drops) / len(self._drops)
        if len(self._drops) == DROP_STEPS and mean > self._next_drop:
            self._warn(
                "train %s, step %d: the target's own log-prob is %.2f nats per token below the reference's: the loss "
                "falls by making negatives less likely still; a smaller lr or beta, or mle_weight, holds it",
                self._name, step, mean,
            )  # fmt: skip
            while self._next_drop < mean:
                self._next_drop *= 2

    def _repetition(self, step: float, repetition: float) -> None:
        if self._first_repetition is None:
            self._first_repetition = repetition
        elif repetition > self._first_repetition + REPETITION and not self._said_repetition:
            self._said_repetition = True
            self._warn(
                "train %s, step %d: %.0f%% of the 4-grams in greedy samples are repetitions, at first it was %.0f%%: "
                "the model begins to loop; a smaller lr or fewer steps, or mle_weight, holds it",
                self._name, step, 100 * repetition, 100 * self._first_repetition,
            )  # fmt: skip


def repetition(samples: Sequence[Sequence[int]]) -> float:
    """Share of 4-grams of token ids that stood in the same sample before (rep-4), over all samples."""
    repeated = total = 0
    for ids in samples:
        grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0
