"""Checks of a training before its first step: its groups, its pairs, and that it starts as its reference."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.trainer.groups import Groups
from cpo_pipe.trainer.mapped_groups import PAIR
from cpo_pipe.trainer.scoring.group_table import Flags, Lengths

log = logging.getLogger(__name__)

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
