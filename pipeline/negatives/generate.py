"""Stage `generate-negatives`: synthetic continuations of the training prompts, from one source or several."""

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.execution.base import Executor, LocalExecutor
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.negatives.config import Negatives
from cpo_pipe.pipeline.negatives.strategy import FindModel, Inputs, Job, Source
from cpo_pipe.pipeline.samples import make_missing
from cpo_pipe.pipeline.scorers.correct import DropCorrect

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The negatives of a run: the selected examples and a job for each source."""

    selection: pa.Table
    jobs: list[Job]
    """One for each source, in the order of the recipe: of equal negatives rank keeps the first source's."""
    drop_correct: DropCorrect | None = None
    """Which negatives `rank` removes because they are correct."""

    @property
    def sources(self) -> list[Source]:
        """The sources of the jobs."""
        return [job.source for job in self.jobs]

    def spec(self) -> list[Spec]:
        """Return their part of the groups' spec, which depends on labels and counts; the rows' specs do not."""
        return [
            {"negatives": source.rows.spec, "count": source.count, "label": source.label} for source in self.sources
        ]

    def missing(self) -> int:
        """Return how many negatives are still to be made."""
        return sum(self.missing_by_source().values())

    def missing_by_source(self) -> dict[str, int]:
        """Return how many negatives of each source are still to be made."""
        ids = self.selection["example_id"]
        return {source.label: int(source.request.missing(ids).sum()) for source in self.sources}

    def check_inputs(self) -> None:
        """Check the inputs of the sources whose negatives are missing.

        Raises:
            InputError: a pool's file breaks a rule, or an API cannot be asked (its client or key is missing).
        """
        for job in self.jobs:
            if job.source.request.missing(self.selection["example_id"]).any():
                job.check_inputs()


def plan_negatives(config: Negatives, store: Store, examples: Examples, find: FindModel, max_tokens: int) -> Plan:
    """Return the negatives that a run needs and the jobs that make them; make none.

    Args:
        config: the recipe's section.
        store: where they are kept.
        examples: what they are made for.
        find: resolves the names of models.
        max_tokens: length limit in tokens, for sources without `max_new_tokens`.

    Raises:
        InputError: a prompt leaves the model no room for `max_new_tokens`; a model or a file is missing.
    """
    selection = examples.read("train", config.max_examples)
    return Plan(
        selection,
        [
            strategy.plan(Inputs(name, store, examples, selection, find, config.seed, max_tokens))
            for name, strategy in config.sources.items()
        ],
        config.drop_correct,
    )


def generate_negatives(plan: Plan, executor: Executor) -> None:
    """Make the missing negatives of a run, source by source.

    Raises:
        InputError: the requested engine does not support the model, a pool's file breaks a rule, or there are too few
            training examples for the requested batch negatives.
        RunError: an API did not answer some requests.
    """
    plan.check_inputs()
    ids = plan.selection["example_id"]
    for job in plan.jobs:
        source, where = job.source, LocalExecutor() if job.in_process else executor
        before, label = _count_recorded(source, ids), f"{source.label} negatives"
        make_missing(source.request, plan.selection, job.work, where, batch_size=job.batch_size, label=label)
        job.check_results()
        recorded = _count_recorded(source, ids)
        log.info("negatives: %d %s in %s (%d made, %d reused)", recorded, source.label, source.rows.name,
                 recorded - before, before)  # fmt: skip
        refused = len(ids) * source.count - recorded
        if refused and source.request.refused is not None:
            log.warning("negatives: %d %s do not exist or cannot be made; the reasons are in %s", refused, source.label,
                        source.request.refused.name)  # fmt: skip


def _count_recorded(source: Source, example_ids: pa.ChunkedArray) -> int:
    return int(np.count_nonzero(source.rows.has_samples(example_ids, source.count)))
