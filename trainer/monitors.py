"""Warnings of the known ways in which preference training goes wrong, each logged once when it shows."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.trainer.groups import Groups
from cpo_pipe.trainer.mapped_groups import PAIR
from cpo_pipe.trainer.objectives.base import Training
from cpo_pipe.trainer.objectives.preference import PreferenceTraining
from cpo_pipe.trainer.scoring.group_table import Flags, Lengths

log = logging.getLogger(__name__)

DROP = 0.5
"""Nats per token that the target's log-prob may fall, below the reference's and since the first step, before a warning;
repeats when the value doubles."""
DROP_STEPS = 10
"""Steps that this is averaged over."""
CHANGE = 0.1
"""Share of the first step's loss by which the median of the last ten must differ to count as risen or fallen."""
START_TOLERANCE = 2e-3
"""How far policy and reference may be apart at step 0, in nats per square root of a token; what is really wrong shows
as a share of a nat per token."""
START_NOISE = 2.0
"""Added to START_TOLERANCE for rounding, as a multiple of the noise that the self-check measured: both models are
rounded, and the reference's log-probs may have been computed in another way."""
ALREADY_RIGHT = 0.8
"""Share of groups whose target the reference prefers, per token, from which there is little to learn."""
ALONE = 0.2
"""Share of groups without a negative from which something is wrong with the negatives."""
REPETITION = 0.2
"""Rise of the share of repeated 4-grams in greedy samples."""


def check_groups(name: str, groups: Groups, total: int) -> None:
    """Log how many groups have K = 1, and warn of too few negatives and of negatives that teach little.

    Args:
        name: of the training, for messages.
        groups: all of the selection with K ≥ 2; without log π_ref only their sizes are checked.
        total: groups of the selection, including those of K = 1.
    """
    several_G = np.diff(groups.bounds) > 1
    alone = total - int(several_G.sum())
    if alone:
        log.info("train %s: %d of %d groups have K = 1, so no preference loss", name, alone, total)
    if alone > ALONE * total:
        log.warning(
            "train %s: %.0f%% of the groups have no negative left (K = 1), and only an MLE loss uses them: their "
            "negatives were rejected, or equal the target; add negatives of another strategy, or sample at a higher "
            "temperature",
            name, 100 * alone / total,
        )  # fmt: skip
    if groups.reference_C is None:
        return
    right = _already_right(groups)[several_G].sum() / max(total - alone, 1)
    if right > ALREADY_RIGHT:
        log.warning(
            "train %s: by log-prob per token the reference already puts the target first in %.0f%% of the groups (of "
            "pairs, the chosen text): there is little to learn; negatives that the reference finds likelier are harder",
            name, 100 * right,
        )  # fmt: skip


def check_pairs(name: str, groups: pa.Table, kinds: Sequence[tuple[str, str]], total: int) -> None:
    """Log how many pairs of each kind there are, and warn if many prompts have no pair.

    Args:
        name: of the training, for messages.
        groups: the pairs.
        kinds: the requested pairs of strategies, [chosen, rejected].
        total: prompts of the selection.

    Raises:
        InputError: no prompt has a pair of one kind.
    """
    prompts = pc.count_distinct(groups["example_id"]).as_py()
    counts = np.bincount(groups[PAIR].to_numpy(), minlength=len(kinds)).tolist()
    found = list(zip(counts, kinds, strict=True))
    shown = ", ".join(f"{count} of {chosen} over {rejected}" for count, (chosen, rejected) in found)
    log.info("train %s: %d pairs of %d of %d prompts: %s", name, groups.num_rows, prompts, total, shown)
    for count, (chosen, rejected) in found:
        if not count:
            raise InputError(
                f"train.{name}.pairs: no pair [{chosen}, {rejected}] exists: no prompt has both (a text that equals "
                "the target or one before it in its group is dropped); remove the pair, or add such texts"
            )
    if total - prompts > ALONE * total:
        log.warning(
            "train %s: %.0f%% of the prompts have none of the pairs, and are not trained on: a file may lack them, or "
            "their texts equal others of the group, which are dropped",
            name, 100 * (total - prompts) / total,
        )  # fmt: skip


def _already_right(groups: Groups) -> Flags:
    """Return for each group whether the target's log-prob per token is above that of every negative."""
    assert groups.reference_C is not None
    per_token_C = groups.reference_C / Lengths.of(groups.table).candidate_C
    first = groups.bounds[:-1]
    target_G = per_token_C[first]
    per_token_C[first] = -np.inf
    right: Flags = target_G > np.maximum.reduceat(per_token_C, first)
    return right


def check_start(name: str, apart: float, noise: float) -> None:
    """Refuse a run that starts from its reference and does not compute it as the reference's log-probs were.

    Of equal models all rewards are 0 at step 0, and the loss of a group is log K (eq. 1), log K! (eq. 2), log 2 (DPO),
    1 (APO). The log-probs themselves are compared: in a loss those that are too large and too small may cancel.

    Args:
        name: of the training, for messages.
        apart: largest |log π_θ − log π_ref| of a candidate, mean over the first batch's groups, in nats per square root
            of a token.
        noise: rounding that the self-check measured, in the same unit.

    Raises:
        RunError: they differ by more than rounding.
    """
    allowed = START_TOLERANCE + START_NOISE * noise
    if not apart <= allowed:
        raise RunError(
            f"train.{name}: step 0: the policy starts from its reference, but their log-probs differ by {apart:.4f} "
            f"nats per square root of a token, where rounding explains {allowed:.4f}: the two are not computed alike"
        )


class Watch:
    """Warn when the metrics of the steps show that a training goes wrong."""

    def __init__(self, name: str, config: Training, metrics: Sequence[dict[str, float]]):
        """`metrics` are those of the steps already done; their warnings are not repeated."""
        self._name, self._config = name, config
        self._silent = True
        self._losses: list[float] = []
        self._drops: list[float] = []
        self._first_loss = self._first_drop = 0.0
        self._next_drop = DROP
        self._first_repetition: float | None = None
        self._warned_repetition = False
        for row in metrics:
            self.step(row)
        self._silent = False

    def _warn(self, message: str, *values: object) -> None:
        if not self._silent:
            log.warning(message, *values)

    def step(self, row: dict[str, float]) -> None:
        """Add the metrics of one more step, and warn if they show a fault."""
        if row.get("target_drop_per_token") is not None and not self._config.lowers_target:
            self._drop(row["step"], row["target_drop_per_token"], row["loss"])
        if row.get("repetition") is not None:
            self._repetition(row["step"], row["repetition"])

    def _drop(self, step: float, drop: float, loss: float) -> None:
        if not self._drops:
            self._first_drop, self._first_loss = drop, loss
        self._drops = [*self._drops[-DROP_STEPS + 1 :], drop]
        self._losses = [*self._losses[-DROP_STEPS + 1 :], loss]
        mean = sum(self._drops) / len(self._drops)
        # A policy that does not start as its reference may be below it from the start, and rise.
        fall = mean - max(self._first_drop, 0.0)
        if len(self._drops) == DROP_STEPS and fall > self._next_drop:
            self._warn(
                "train %s, step %d: the target's own log-prob is %.2f nats per token below the reference's, and at the "
                "first step it was %.2f: %s",
                self._name, step, mean, self._first_drop, self._advice(float(np.median(self._losses))),
            )  # fmt: skip
            while self._next_drop < fall:
                self._next_drop *= 2

    def _advice(self, loss: float) -> str:
        """Return how the loss explains a target that gets less likely, and what to change."""
        change = f"from {self._first_loss:.4g} to {loss:.4g}"
        if loss > self._first_loss * (1 + CHANGE):
            return (
                f"the loss rose {change}, the training diverges; lower learning_rate, raise beta or set max_grad_norm"
            )
        if loss < self._first_loss * (1 - CHANGE):
            return (f"the loss fell {change}: it rewards the order of the candidates, not a likely target; "
                    "lower learning_rate, or raise beta or mle_weight, to keep the target likely")  # fmt: skip
        return f"the loss went {change}, so nothing was gained; lower learning_rate, or raise beta or mle_weight"

    def _repetition(self, step: float, repetition: float) -> None:
        if self._first_repetition is None:
            self._first_repetition = repetition
        elif repetition > self._first_repetition + REPETITION and not self._warned_repetition:
            self._warned_repetition = True
            # An MLE loss would work against an objective that lowers the target.
            has_mle = isinstance(self._config, PreferenceTraining) and not self._config.lowers_target
            self._warn(
                "train %s, step %d: %.0f%% of the 4-grams in greedy samples are repetitions, at first it was %.0f%%: "
                "the model begins to loop; lower learning_rate or train for fewer steps%s",
                self._name, step, 100 * repetition, 100 * self._first_repetition,
                ", or raise mle_weight" if has_mle else "",
            )  # fmt: skip


def repetition(samples: Sequence[Sequence[int]]) -> float:
    """Return the share of 4-grams of token ids that repeat an earlier one of the same sample (rep-4)."""
    repeated = total = 0
    for ids in samples:
        grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0
