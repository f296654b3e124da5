"""How difficult each group is, for a training that takes them from easy to hard.

Shapes: G groups, C candidates of all of them together.
"""

import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.models.model import Model, ScratchModel
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.curriculum import Curriculum
from cpo_pipe.trainer.mapped_groups import DIFFICULTY
from cpo_pipe.trainer.scoring.group_table import Lengths

Floats = NDArray[np.float64]

ALONE = math.nan
"""The difficulty of a group of one, which has nothing to compare: such groups are spread evenly over the others."""


def strength_gaps(name: str, candidates: pa.ListArray, strengths: Mapping[str, float]) -> Floats:
    """Return the difficulty of groups by the strength of their candidates' sources, shape (G,).

    A group is the harder, the less the strength of its first candidate's source exceeds the mean of the others'.

    Raises:
        InputError: the strength of a source is unknown.
    """
    labels, size_G = candidates.flatten().field("strategy").to_pylist(), _sizes(candidates)
    if unknown := sorted(set(labels) - strengths.keys()):
        raise InputError(
            f"train.{name}.curriculum.by is strength, but {unknown[0]} has none; set negatives.target_strength for the "
            "target and strength for the sources of negatives"
        )
    # Rounded: 0.9 − 0.8 and 0.8 − 0.7 are one gap.
    scale = max(map(abs, strengths.values())) or 1.0
    return np.round(-_lead(np.array([strengths[label] for label in labels]) / scale, size_G), 9) * scale


def similarities(candidates: pa.ListArray) -> Floats:
    """Return the mean cosine of each group's negatives to the target, its difficulty, shape (G,)."""
    values = candidates.flatten().field("similarity")
    assert not values.null_count, "groups that are not ranked have none"
    values_C, size_G = values.to_numpy().astype(np.float64), _sizes(candidates)
    values_C[np.concatenate([[0], np.cumsum(size_G)[:-1]])] = 0.0
    return -_lead(values_C, size_G)


def margins(reference_C: Floats, tokens_C: NDArray[np.int64], size_G: NDArray[np.int64]) -> Floats:
    """Return the negatives' mean log π_ref per token less the first candidate's, the difficulty, shape (G,)."""
    return -_lead(reference_C / tokens_C, size_G)


def _sizes(candidates: pa.ListArray) -> NDArray[np.int64]:
    sizes: NDArray[np.int64] = pc.list_value_length(candidates).to_numpy().astype(np.int64)
    return sizes


def _lead(values_C: Floats, size_G: NDArray[np.int64]) -> Floats:
    """Return the first candidate's value less the mean of the others', and ALONE for a group of one."""
    first = np.concatenate([[0], np.cumsum(size_G)[:-1]])
    sums = np.add.reduceat(values_C, first) - values_C[first]
    lead: Floats = np.where(size_G > 1, values_C[first] - sums / np.maximum(size_G - 1, 1), ALONE)
    return lead


def check_differences(name: str, curriculum: Curriculum, difficulty_G: Floats) -> None:
    """Refuse groups that are all equally difficult.

    Raises:
        InputError: they are.
    """
    measured_G = difficulty_G[~np.isnan(difficulty_G)]
    if len(np.unique(measured_G)) < 2:
        raise InputError(
            f"train.{name}.curriculum.by is {curriculum.by}, but by this measure all groups are equally "
            "difficult; remove the curriculum, or use another measure"
        )


def group_difficulties(
    curriculum: Curriculum,
    store: Store,
    init: Model | ScratchModel,
    examples: pa.Table,
    groups: pa.Table,
    reference_C: Floats | None,
    executor: Executor,
) -> Floats:
    """Return the difficulty of each group, shape (G,).

    Args:
        curriculum: names the measure.
        store: where log-probs of targets are kept.
        init: the model whose log-probs measure the likelihood.
        examples: the examples of the groups, in their order.
        groups: the groups; with the column DIFFICULTY where it was measured as they were read.
        reference_C: log π_ref of all candidates, for the measure `margin`.
        executor: computes log-probs that are missing.
    """
    lengths = Lengths.of(groups)
    match curriculum.by:
        case "strength" | "similarity":
            found: Floats = groups[DIFFICULTY].to_numpy()
            return found
        case "margin":
            assert reference_C is not None
            return margins(reference_C, lengths.candidate_C, lengths.size_G)
        case "length":
            return lengths.candidate_C.astype(np.float64)
        case "likelihood":
            assert isinstance(init, Model)
            from cpo_pipe.trainer.scoring.logprobs import target_logprobs

            scored = target_logprobs(store, init, examples, executor)
            return np.array([-logprob / tokens for logprob, tokens in scored])
