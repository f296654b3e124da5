"""How much a stage of a run does: what `plan` shows, and what the probe measures less of."""

from dataclasses import dataclass

import pyarrow.compute as pc

from cpo_pipe.run import Run

EXISTS, MAKE = "exists", "make"


@dataclass
class StagePlan:
    """What a stage would make."""

    stage: str
    state: str
    """`exists` or `make`."""
    why: str = ""
    amount: int = 0
    """Of `unit`, still to be made; where all exist, how many there are."""
    unit: str = ""
    tokens: int | None = None
    calls: int = 0
    """Of APIs."""
    usd: float | None = None
    disk: int | None = None
    """Bytes."""
    memory: int | None = None
    """Peak in bytes, of the machine or, for a stage on a GPU, of the GPU."""
    seconds: float | None = None
    share: float = 1.0
    """Of the stage's samples, groups or outputs, those still to be made."""


def prompts_with_negatives(run: Run, owner: str | None) -> int:
    """Return how many examples get negatives."""
    section = run.resolver.negatives_section(owner)
    there: int = run.resolver.examples().artifact.manifest["examples"]["train"]
    return min(there, section.max_examples or there)


def examples_evaluated(run: Run) -> int:
    """Return how many examples are evaluated."""
    config = run.resolver.evaluate_section()
    there: int = run.resolver.examples().artifact.manifest["examples"][config.split]
    return min(there, config.examples or there)


def mean_length(run: Run, column: str) -> float:
    """Return the mean number of tokens in a column of the training examples."""
    table = run.resolver.examples().read("train", columns=[column])
    return float(pc.mean(pc.list_value_length(table[column])).as_py() or 0)
