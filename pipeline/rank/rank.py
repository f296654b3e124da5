"""Stage `rank`: groups of candidates, ordered by their similarity to the target (Feng et al. 2025, §3, "ranking")."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.errors import MissingInput
from cpo_pipe.data.execution.base import Executor, Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.embedder import tied, truncation
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.store.locks import make_missing
from cpo_pipe.pipeline.negatives.generate import Plan
from cpo_pipe.pipeline.negatives.strategy import Source
from cpo_pipe.pipeline.rank.candidates import add_ranks, collect_candidates, dropped_reasons, unrecorded
from cpo_pipe.pipeline.rank.scorer import ScoreGroups, Scorer

log = logging.getLogger(__name__)

SLICE = 512
"""Examples whose negatives are read together."""
RULES = 4
"""Raise it when the same negatives yield other groups, or candidates get other columns."""


def plan_groups(config: Scorer, store: Store, plan: Plan) -> tuple[Rows, Rows]:
    """Return the artifact of the groups and that of the dropped negatives; make nothing."""
    spec: Spec = {
        "candidates": plan.spec(),
        "scorer": config.spec(store),
        "drop_duplicates": config.drop_duplicates,
        "rules": RULES,
    }
    return store.rows("groups", spec), store.rows("rejected", {"of": spec})


def rank(config: Scorer, store: Store, plan: Plan, executor: Executor) -> Rows:
    """Make the groups that are missing, each with the target first and K − 1 negatives.

    Raises:
        MissingInput: negatives of an example are missing.
    """
    groups, dropped = plan_groups(config, store, plan)
    example_ids = plan.selection["example_id"].to_pylist()

    def find() -> pa.Table:
        missing = groups.missing(plan.selection.select(["example_id"]))
        if missing.num_rows and (absent := plan.missing()):
            raise MissingInput(f"{absent} negatives are missing: run `cpo-pipe generate-negatives` first")
        return missing

    def make(missing: pa.Table) -> None:
        ids = missing["example_id"].combine_chunks()
        examples = plan.selection.filter(pc.is_in(plan.selection["example_id"], ids))
        batches = (examples.slice(start, SLICE) for start in range(0, examples.num_rows, SLICE))
        score = config.open(store) if config.ranks else None
        work = GroupWork(dropped, groups, plan.sources, score, config.drop_duplicates, config.batch_size)
        executor.run(work, batches, "rank", examples.num_rows)

    make_missing(find, make, groups, dropped)
    counts = _count(groups, example_ids)
    made = sum(int(source.rows.has_samples(example_ids, source.count).sum()) for source in plan.sources)
    reasons = dropped_reasons(dropped, example_ids)
    if reasons.total() < len(example_ids) + made - counts.candidates:  # a shard of the reasons was damaged
        with dropped.lock():
            for start in range(0, plan.selection.num_rows, SLICE):
                part = plan.selection.slice(start, SLICE).to_pylist()
                _, refused = collect_candidates(part, plan.sources, config.drop_duplicates)
                dropped.append(pa.Table.from_pylist(unrecorded(refused, dropped), schema=dropped.schema))
        reasons = dropped_reasons(dropped, example_ids)
    log.info("%s", counts.summary(groups.name, reasons))
    if counts.truncated and (embedder := config.embedder(store)) is not None:
        remedy = "set rank.model to a model that reads more"
        cut = truncation(counts.truncated, counts.candidates, embedder.name, embedder.window(), remedy)
        log.warning("rank: %s", cut)
    return groups


@dataclass(frozen=True)
class GroupWork(Work):
    """Work that makes groups of examples (EXAMPLES schema), and records which negatives were dropped."""

    dropped: Rows
    groups: Rows
    sources: Sequence[Source]
    score: ScoreGroups | None
    """None: groups are not ranked."""
    drop_duplicates: bool
    batch_size: int

    @property
    def outputs(self) -> list[Rows]:
        """The reasons are recorded before the groups, so that each recorded group has its reasons."""
        return [self.dropped, self.groups]

    def open(self) -> Make:
        """Return what makes groups; nothing is loaded before the first text."""
        return self._make

    def _make(self, batch: pa.Table) -> Iterator[NewRows]:
        examples = batch.to_pylist()
        kept, refused = collect_candidates(examples, self.sources, self.drop_duplicates)
        refused = unrecorded(refused, self.dropped)
        for first in range(0, len(examples), self.batch_size):
            part = slice(first, first + self.batch_size)
            if self.score is not None:
                texts = [[candidate["text"] for candidate in group] for group in kept[part]]
                add_ranks(kept[part], self.score(texts))
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
            line += f"; {self.tied} negatives have the same similarity as another one of their group"
        return line


def _count(groups: Rows, example_ids: list[str]) -> _Counts:
    """Count what the groups of these examples contain."""
    counts = _Counts()
    for table in groups.batches(example_ids, columns=["candidates"]):
        lists = table["candidates"].combine_chunks()
        rows, group = lists.flatten(), pc.list_parent_indices(lists).to_numpy()
        negative = np.diff(group, prepend=-1) == 0  # the target is the first of each group
        cosines = np.asarray(rows.field("similarity").to_numpy(zero_copy_only=False), np.float64)
        counts.sizes.update(pc.list_value_length(lists).to_pylist())
        counts.truncated += pc.sum(rows.field("truncated")).as_py() or 0
        counts.tied += int(tied(cosines[negative], group[negative]).sum())
    return counts
