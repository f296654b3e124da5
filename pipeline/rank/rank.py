"""Stage `rank`: groups of candidates, ordered by their similarity to the target (Feng et al. 2025, §3, "ranking")."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import MissingInput
from cpo_pipe.data.execution.base import Executor, LocalExecutor, Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.embedder import tied, truncation
from cpo_pipe.data.store import Rows
from cpo_pipe.data.store.locks import make_missing
from cpo_pipe.pipeline.negatives.generate import Plan
from cpo_pipe.pipeline.negatives.strategy import Source
from cpo_pipe.pipeline.rank.candidates import (
    CorrectFilter,
    add_ranks,
    checked_scores,
    collect_candidates,
    dropped_reasons,
    unrecorded,
)
from cpo_pipe.pipeline.scorers.correct import DropCorrect
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer
from cpo_pipe.pipeline.scorers.scorer import ScoreGroups, Scorer, ScorerDependencies

log = logging.getLogger(__name__)

SLICE = 512
"""Examples whose negatives are read together."""
RULES = 4
"""Raise it when the same negatives yield other groups, or candidates get other columns."""


def plan_groups(config: Scorer, dependencies: ScorerDependencies, plan: Plan) -> tuple[Rows, Rows]:
    """Return the artifact of the groups and that of the dropped negatives; make nothing."""
    correct = plan.drop_correct
    spec: Spec = {
        "candidates": plan.spec(),
        "scorer": config.spec(dependencies),
        "drop_duplicates": config.drop_duplicates,
        **({"drop_correct": correct.spec(dependencies)} if correct is not None else {}),
        "rules": RULES,
    }
    store = dependencies.store
    return store.rows("groups", spec), store.rows("rejected", {"of": spec})


def check_scorers(
    config: Scorer, correct: DropCorrect | None, dependencies: ScorerDependencies, targets: Sequence[str]
) -> None:
    """Check that the negatives of these targets can be scored, before anything is made.

    Raises:
        InputError: a scorer cannot work with these targets, or an API cannot be asked (its client or key is missing).
    """
    for scorer in _scorers(config, correct):
        scorer.check(dependencies, targets)


def rank(config: Scorer, dependencies: ScorerDependencies, plan: Plan, executor: Executor) -> Rows:
    """Make the groups that are missing, each with the target first and its negatives after it.

    Raises:
        InputError: a scorer cannot work with these examples.
        MissingInput: negatives of an example are missing.
        RunError: an API that scores did not answer every request, or a cap is reached.
    """
    groups, dropped = plan_groups(config, dependencies, plan)
    example_ids = plan.selection["example_id"].to_pylist()
    work = _work(config, dependencies, plan, dropped, groups)

    def find() -> pa.Table:
        missing = groups.missing(plan.selection.select(["example_id"]))
        if missing.num_rows and (absent := plan.missing()):
            raise MissingInput(f"{absent} negatives are missing: run `cpo-pipe generate-negatives` first")
        return missing

    def make(missing: pa.Table) -> None:
        check_scorers(config, plan.drop_correct, dependencies, plan.selection["target"].to_pylist())
        ids = missing["example_id"].combine_chunks()
        examples = plan.selection.filter(pc.is_in(plan.selection["example_id"], ids))
        batches = (examples.slice(start, SLICE) for start in range(0, examples.num_rows, SLICE))
        in_process = any(scorer.in_process for scorer in _scorers(config, plan.drop_correct))
        where = LocalExecutor() if in_process else executor
        where.run(work, batches, "rank", examples.num_rows)

    make_missing(find, make, groups, dropped)
    counts = _count(groups, example_ids)
    made = sum(int(source.rows.has_samples(example_ids, source.count).sum()) for source in plan.sources)
    reasons = dropped_reasons(dropped, example_ids)
    if reasons.total() < len(example_ids) + made - counts.candidates:  # a shard of the reasons was damaged
        with dropped.lock():
            for start in range(0, plan.selection.num_rows, SLICE):
                _, refused = work.candidates(plan.selection.slice(start, SLICE).to_pylist())
                dropped.append(pa.Table.from_pylist(unrecorded(refused, dropped), schema=dropped.schema))
        reasons = dropped_reasons(dropped, example_ids)
    log.info("%s", counts.summary(groups.name, reasons))
    if counts.truncated:
        remedy = "set rank.model to a model that reads more"
        if isinstance(config, EmbeddingScorer):
            remedy += ", rank.long_texts to average"
        name, window = getattr(config, "model", config.by), config.window(dependencies.store)
        log.warning("rank: %s", truncation(counts.truncated, counts.candidates, name, window, remedy))
    for scorer in _scorers(config, plan.drop_correct):
        for note in scorer.notes(dependencies, plan.selection):
            log.warning("rank: %s", note)
    return groups


def _scorers(config: Scorer, correct: DropCorrect | None) -> list[Scorer]:
    """Return what scores the negatives: what finds correct ones, and what orders the others."""
    return [*([correct.scorer()] if correct is not None else []), *([config] if config.ranks else [])]


def _work(config: Scorer, dependencies: ScorerDependencies, plan: Plan, dropped: Rows, groups: Rows) -> "GroupWork":
    """Return the work that makes groups; no model is loaded."""
    correct = plan.drop_correct
    is_correct = None
    if correct is not None:
        is_correct = CorrectFilter(correct.scorer().open(dependencies), correct.least, correct.reason)
    score = config.open(dependencies) if config.ranks else None
    return GroupWork(dropped, groups, plan.sources, score, config.drop_duplicates, is_correct, config.batch_size)


@dataclass(frozen=True)
class GroupWork(Work):
    """Work that makes groups of examples (EXAMPLES schema), and records which negatives were dropped."""

    unit: ClassVar[str] = "groups"

    dropped: Rows
    groups: Rows
    sources: Sequence[Source]
    score: ScoreGroups | None
    """None: groups are not ranked."""
    drop_duplicates: bool
    correct: CorrectFilter | None
    batch_size: int

    @property
    def outputs(self) -> list[Rows]:
        """The reasons are recorded before the groups, so that each recorded group has its reasons."""
        return [self.dropped, self.groups]

    def open(self) -> Make:
        """Return what makes groups; nothing is loaded before the first text."""
        return self._make

    def candidates(self, examples: Sequence[dict[str, Any]]) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
        """Return the unranked candidates of each example, and the rows of the negatives that were dropped."""
        groups, refused = collect_candidates(examples, self.sources, self.drop_duplicates)
        if self.correct is None:
            return groups, refused
        kept: list[list[dict[str, Any]]] = []
        for first in range(0, len(examples), self.batch_size):
            part = slice(first, first + self.batch_size)
            left, correct = self.correct.drop(examples[part], groups[part])
            kept, refused = kept + left, refused + correct
        return kept, refused

    def _make(self, batch: pa.Table) -> Iterator[NewRows]:
        examples = batch.to_pylist()
        kept, refused = self.candidates(examples)
        refused = unrecorded(refused, self.dropped)
        for first in range(0, len(examples), self.batch_size):
            part = slice(first, first + self.batch_size)
            if self.score is not None:
                add_ranks(kept[part], checked_scores(self.score, examples[part], kept[part], "rank.by"))
            groups = [
                {"example_id": e["example_id"], "prompt_ids": e["prompt_ids"], "candidates": candidates}
                for e, candidates in zip(examples[part], kept[part], strict=True)
            ]
            yield NewRows([[] if first else refused, groups], len(groups))


@dataclass
class _Counts:
    """What groups contain."""

    sizes: Counter[int] = field(default_factory=Counter)
    """Number of groups with K candidates, by K."""
    truncated: int = 0
    """Candidates that the scorer did not read to their end."""
    tied: int = 0
    """Negatives whose score equals that of another one of their group."""

    @property
    def candidates(self) -> int:
        """Number of candidates of all groups, targets included."""
        return sum(size * count for size, count in self.sizes.items())

    def summary(self, artifact: str, dropped: Counter[str]) -> str:
        """Return the line that the stage logs."""
        total = self.sizes.total()
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
        line = f"groups: {total} in {artifact}, K {self.candidates / max(total, 1):.2f} on average; dropped: {reasons}"
        if self.sizes[1]:
            line += f"; {self.sizes[1]} groups have no negative left and leave the listwise loss"
        if self.tied:
            line += f"; {self.tied} negatives have the same score as another one of their group"
        return line


def _count(groups: Rows, example_ids: list[str]) -> _Counts:
    """Count what the groups of these examples contain."""
    counts = _Counts()
    for table in groups.batches(example_ids, columns=["candidates"]):
        lists = table["candidates"].combine_chunks()
        rows, group = lists.flatten(), pc.list_parent_indices(lists).to_numpy()
        negative = np.diff(group, prepend=-1) == 0  # the target is the first of each group
        scores = np.asarray(rows.field("similarity").to_numpy(zero_copy_only=False), np.float64)[negative]
        counts.sizes.update(pc.list_value_length(lists).to_pylist())
        counts.truncated += pc.sum(rows.field("truncated")).as_py() or 0
        counts.tied += int(tied(scores, group[negative]).sum())
    return counts
