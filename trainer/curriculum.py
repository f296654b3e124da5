"""The order in which a training takes its groups: shuffled, or from easy to hard.

Xu et al. 2024 ("Automatic Pair Construction") begin with pairs whose models are far apart in strength and continue with
close ones. Pang et al. 2024 ("Phased instruction fine-tuning") do so with targets alone. How difficult each group is,
`trainer/difficulty.py` measures.

Shapes: G groups.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cpo_pipe.data.config import Section


class Curriculum(Section):
    """Groups from easy to hard."""

    by: Literal["strength", "similarity", "margin", "likelihood", "length"] = Field(
        description="what makes a group hard: `strength` (a small gap between the sources of a pair), `similarity` "
        "(negatives near the target), `margin` (negatives as likely to the reference as the target, per token); for "
        "mle and pss `likelihood` (targets unlikely to the initial model, per token), `length` (long targets)"
    )
    order: Literal["staged", "continuous"] = Field(
        "staged", description="`staged`: part by part; `continuous`: from a share of the easiest that grows to all"
    )
    stages: int = Field(2, ge=2, description="staged: parts, of equal size and equally many steps")
    start: float = Field(0.2, gt=0, le=1, description="continuous: the share at the first step")

    @model_validator(mode="after")
    def _check(self) -> "Curriculum":
        unused = "start" if self.order == "staged" else "stages"
        if unused in self.model_fields_set:
            raise ValueError(f"{unused} is not used by the order {self.order}; remove it")
        return self


def shuffled_batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield the indices of each step's batch: shuffled passes over all groups, cut into batches of `size`."""

    def passes() -> Iterator[int]:
        epoch = 0
        while True:
            yield from np.random.default_rng([seed, epoch]).permutation(count).tolist()
            epoch += 1

    stream = passes()
    for _ in range(steps):
        yield [next(stream) for _ in range(size)]


def order_of(difficulty_G: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Return the groups from easy to hard, ties in random order; groups without a difficulty are spread evenly."""
    shuffled = np.random.default_rng([seed, 1 << 32]).permutation(len(difficulty_G))
    alone = np.isnan(difficulty_G[shuffled])
    ordered, spread = shuffled[~alone], shuffled[alone]
    ordered = ordered[np.argsort(difficulty_G[ordered], kind="stable")]
    between = np.arange(len(spread)) * (len(ordered) + 1) // max(len(spread), 1)
    order: NDArray[np.int64] = np.insert(ordered, between, spread)
    return order


def curriculum_batches(
    config: Curriculum, difficulty_G: NDArray[np.float64], size: int, steps: int, seed: int
) -> Iterator[list[int]]:
    """Yield the indices of each step's batch; a resumed training gets the same.

    `staged`: the groups in equal parts by difficulty, each for an equal share of the steps, in shuffled passes.
    `continuous`: each batch is drawn from the easiest share of the groups, which grows evenly from `start` to all of
    them at the last step (a linear competence, Platanios et al. 2019).
    """
    order = order_of(difficulty_G, seed)
    if config.order == "staged":
        parts = np.array_split(order, config.stages)
        for stage, (part, share) in enumerate(zip(parts, np.array_split(np.arange(steps), config.stages), strict=True)):
            for batch in shuffled_batches(len(part), size, len(share), seed + stage):
                yield part[batch].tolist()
        return
    for step in range(steps):
        competence = config.start + (1 - config.start) * step / max(steps - 1, 1)
        easiest = order[: max(1, int(np.ceil(round(competence * len(order), 6))))]  # 12.000000000000002 is 12
        random = np.random.default_rng([seed, step, 1 << 33])
        yield random.choice(easiest, size, replace=len(easiest) < size).tolist()
