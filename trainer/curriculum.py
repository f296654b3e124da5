"""From easy to hard: how difficult each group is, and in which order a training takes them.

Xu et al. 2024 ("Automatic Pair Construction") begin with pairs whose models are far apart in strength and go on with
close ones; Pang et al. 2024 ("Phased instruction fine-tuning") do the like with targets alone.

Shapes: G groups, C candidates of all of them together.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.recipe import Curriculum
from cpo_pipe.trainer.batches import batches

Floats = NDArray[np.float64]

ALONE = math.nan
"""The difficulty of a group of one, which has nothing to compare: such groups are spread evenly over the others."""


def strength_gaps(name: str, candidates: pa.ListArray, strengths: Mapping[str, float]) -> Floats:
    """Difficulty of groups (candidates with `strategy`) by the strength of what wrote them, shape (G,).

    The less the strength of the first candidate's source exceeds the mean of the others', the harder.

    Raises:
        InputError: of a source no strength is known.
    """
    labels, size_G = candidates.flatten().field("strategy").to_pylist(), _sizes(candidates)
    if unknown := sorted(set(labels) - strengths.keys()):
        raise InputError(
            f"train.{name}.curriculum.by is strength, but none is known of {unknown[0]}: give "
            "negatives.target_strength for the target; of the others only pools have one"
        )
    # Rounded: 0.9 − 0.8 and 0.8 − 0.7 are one gap.
    scale = max(map(abs, strengths.values())) or 1.0
    return np.round(-_lead(np.array([strengths[label] for label in labels]) / scale, size_G), 9) * scale


def similarities(candidates: pa.ListArray) -> Floats:
    """Difficulty of groups (candidates with `similarity`): mean cosine of the negatives to the target, shape (G,)."""
    values = candidates.flatten().field("similarity")
    assert not values.null_count, "groups that are not ranked have none"
    values_C, size_G = values.to_numpy().astype(np.float64), _sizes(candidates)
    values_C[np.concatenate([[0], np.cumsum(size_G)[:-1]])] = 0.0
    return -_lead(values_C, size_G)


def margins(reference_C: Floats, tokens_C: NDArray[np.int64], size_G: NDArray[np.int64]) -> Floats:
    """Difficulty by the reference: the negatives' mean log-prob per token less the first candidate's, shape (G,)."""
    return -_lead(reference_C / tokens_C, size_G)


def order_of(difficulty_G: Floats, seed: int) -> NDArray[np.int64]:
    """The groups from easy to hard; equally difficult ones in an order drawn by the seed, those of one between."""
    shuffled = np.random.default_rng([seed, 1 << 32]).permutation(len(difficulty_G))
    alone = np.isnan(difficulty_G[shuffled])
    ordered, spread = shuffled[~alone], shuffled[alone]
    ordered = ordered[np.argsort(difficulty_G[ordered], kind="stable")]
    between = np.arange(len(spread)) * (len(ordered) + 1) // max(len(spread), 1)
    order: NDArray[np.int64] = np.insert(ordered, between, spread)
    return order


def curriculum_batches(
    config: Curriculum, difficulty_G: Floats, size: int, steps: int, seed: int
) -> Iterator[list[int]]:
    """Indices of each step's batch; the same again after a resume.

    `staged`: the groups in equal parts by difficulty, each for an equal share of the steps, in shuffled passes.
    `continuous`: each batch is drawn from the easiest share of the groups, which grows evenly from `start` to all of
    them at the last step (a linear competence, Platanios et al. 2019).
    """
    order = order_of(difficulty_G, seed)
    if config.order == "staged":
        parts = np.array_split(order, config.stages)
        for stage, (part, share) in enumerate(zip(parts, np.array_split(np.arange(steps), config.stages), strict=True)):
            for batch in batches(len(part), size, len(share), seed + stage):
                yield part[batch].tolist()
        return
    for step in range(steps):
        competence = config.start + (1 - config.start) * step / max(steps - 1, 1)
        easiest = order[: max(1, int(np.ceil(round(competence * len(order), 6))))]  # 12.000000000000002 is 12
        random = np.random.default_rng([seed, step, 1 << 33])
        yield random.choice(easiest, size, replace=len(easiest) < size).tolist()


def _sizes(candidates: pa.ListArray) -> NDArray[np.int64]:
    sizes: NDArray[np.int64] = pc.list_value_length(candidates).to_numpy().astype(np.int64)
    return sizes


def _lead(values_C: Floats, size_G: NDArray[np.int64]) -> Floats:
    """The first candidate's value less the mean of the others', and ALONE for a group of one."""
    first = np.concatenate([[0], np.cumsum(size_G)[:-1]])
    sums = np.add.reduceat(values_C, first) - values_C[first]
    lead: Floats = np.where(size_G > 1, values_C[first] - sums / np.maximum(size_G - 1, 1), ALONE)
    return lead
