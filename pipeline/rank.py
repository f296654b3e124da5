"""Stage `rank`: groups of candidates, in the order of their similarity to the target (§3, "ranking")."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.embedding import Embedder, locate_embedder, tied, truncation
from cpo_pipe.data.end_tokens import without_end
from cpo_pipe.data.errors import MissingInput
from cpo_pipe.data.executor import Executor, Made, Make
from cpo_pipe.data.fingerprint import Spec, candidate_id
from cpo_pipe.data.recipe import Rank
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.generate import Source, Sources

log = logging.getLogger(__name__)

COPY = "copy of the target"
DUPLICATE = "duplicate of another negative"

SLICE = 512
"""Examples whose negatives are read together."""
RULES = 2
"""Raise when the same negatives come to make other groups, or candidates get other columns."""


def plan_groups(config: Rank, ranked: bool, store: Store, sources: Sources) -> tuple[Rows, Rows, Embedder | None]:
    """The groups' artifact, that of the dropped negatives, and the embedding model (None: unranked). Makes nothing."""
    embedder = locate_embedder(config.model, store) if ranked else None
    spec: Spec = {
        "candidates": sources.spec(),
        "embedder": embedder.fingerprint if embedder else None,
        "drop_duplicates": config.drop_duplicates,
        "rules": RULES,
    }
    return store.rows("groups", spec), store.rows("rejected", {"of": spec}), embedder


@dataclass(frozen=True)
class Grouped:
    """Work that makes groups of examples (EXAMPLES schema), and notes which negatives were dropped."""

    dropped: Rows
    groups: Rows
    sources: Sequence[Source]
    embedder: Embedder | None
    drop_duplicates: bool
    batch_size: int
    at_once: bool = False

    @property
    def outputs(self) -> list[Rows]:
        """The reasons are recorded before the groups: a group that is there has its reasons."""
        return [self.dropped, self.groups]

    def open(self) -> Make:
        """Nothing is loaded before the first text."""
        return self._make

    def _make(self, batch: pa.Table) -> Iterator[Made]:
        examples = batch.to_pylist()
        kept, refused = collect_candidates(examples, self.sources, self.drop_duplicates)
        refused = _unrecorded(refused, self.dropped)
        for first in range(0, len(examples), self.batch_size):
            part = slice(first, first + self.batch_size)
            if self.embedder is not None:
                add_ranks(kept[part], self.embedder)
            groups = [
                {"example_id": e["example_id"], "prompt_ids": e["prompt_ids"], "candidates": candidates}
                for e, candidates in zip(examples[part], kept[part], strict=True)
            ]
            yield Made([[] if first else refused, groups], len(groups))


def rank(config: Rank, ranked: bool, store: Store, sources: Sources, executor: Executor) -> Rows:
    """Make the groups that are missing, each with the target first and K − 1 negatives; without `ranked`, in no order.

    Raises:
        MissingInput: negatives of an example are missing.
    """
    groups, dropped, embedder = plan_groups(config, ranked, store, sources)
    example_ids = sources.selection["example_id"].to_pylist()
    if groups.missing(sources.selection.select(["example_id"])).num_rows:
        if sources.missing():
            raise MissingInput(f"{sources.missing()} negatives are missing: run `cpo-pipe generate-negatives` first")
        with groups.lock(), dropped.lock():
            missing = groups.missing(sources.selection.select(["example_id"]))["example_id"]
            examples = sources.selection.filter(pc.is_in(sources.selection["example_id"], missing.combine_chunks()))
            batches = (examples.slice(start, SLICE) for start in range(0, examples.num_rows, SLICE))
            work = Grouped(dropped, groups, sources.pools, embedder, config.drop_duplicates, config.batch_size)
            executor.run(work, batches, "rank", examples.num_rows)
    kept = _count_kept(groups, example_ids)
    made = sum(int(source.rows.has_samples(example_ids, source.count).sum()) for source in sources.pools)
    reasons = dropped_reasons(dropped, example_ids)
    lost = len(example_ids) + made - kept.candidates
    if reasons.total() < lost:  # a shard of the reasons was damaged
        with dropped.lock():
            _explain_again(config, sources, dropped)
        reasons = dropped_reasons(dropped, example_ids)
    _summarize(groups, kept, reasons)
    if embedder is not None and kept.truncated:
        remedy = "set rank.model to a model that reads more"
        cut = truncation(kept.truncated, kept.candidates, embedder.name, embedder.window(), remedy)
        log.warning("rank: %s", cut)
    return groups


def _explain_again(config: Rank, sources: Sources, dropped: Rows) -> None:
    """Record the reasons that are missing; the groups they belong to are there."""
    for start in range(0, sources.selection.num_rows, SLICE):
        examples = sources.selection.slice(start, SLICE).to_pylist()
        _, refused = collect_candidates(examples, sources.pools, config.drop_duplicates)
        dropped.append(pa.Table.from_pylist(_unrecorded(refused, dropped), schema=dropped.schema))


def _unrecorded(refused: Sequence[dict[str, Any]], dropped: Rows) -> list[dict[str, Any]]:
    """Return the rows that are not in `dropped`; a run that was killed may have recorded some without their groups."""
    recorded = dropped.contains(pa.Table.from_pylist(list(refused), schema=dropped.schema))
    return [row for row, is_there in zip(refused, recorded, strict=True) if not is_there]


def collect_candidates(
    examples: Sequence[dict[str, Any]], sources: Sequence[Source], drop_duplicates: bool
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return candidates of each example, target first, unranked, and the rows of the negatives that were dropped.

    Candidates are compared without the token that ends them: a copy of the target is one whatever ends it.
    """
    negatives: dict[str, list[dict[str, Any]]] = {example["example_id"]: [] for example in examples}
    for source in sources:
        columns = ["example_id", "sample_index", "text", "token_ids", "finish_reason"]
        table = source.rows.read(list(negatives), columns, refresh=False)  # all were there when this began
        for row in table.filter(pc.less(table["sample_index"], source.count)).to_pylist():
            negatives[row["example_id"]].append({**row, "strategy": source.label})
    kept: list[list[dict[str, Any]]] = []
    refused: list[dict[str, Any]] = []
    for example in examples:
        prompt_ids, target = example["prompt_ids"], tuple(without_end(example["target_ids"], example["ends"]))
        candidates = [_candidate(prompt_ids, example["target"], example["target_ids"], "target")]
        seen = {target}
        for row in negatives[example["example_id"]]:
            ids = tuple(without_end(row["token_ids"], row["finish_reason"] == "stop"))
            if drop_duplicates and ids in seen:
                refused.append(_refusal(row, COPY if ids == target else DUPLICATE))
                continue
            seen.add(ids)
            candidates.append(_candidate(prompt_ids, row["text"], row["token_ids"], row["strategy"]))
        kept.append(candidates)
    return kept, refused


def add_ranks(groups: Sequence[list[dict[str, Any]]], embedder: Embedder) -> None:
    """Set `similarity`, `truncated` and `rank` in place: target first, then by falling cosine, ties by candidate id."""
    vectors, truncated = embedder.embed([candidate["text"] for group in groups for candidate in group])
    start = 0
    for group in groups:
        here = slice(start, start + len(group))
        cosines = vectors[here] @ vectors[start]
        start += len(group)
        for candidate, cosine, cut in zip(group, cosines, truncated[here], strict=True):
            candidate["similarity"] = min(1.0, max(-1.0, float(cosine)))
            candidate["truncated"] = bool(cut)
        order = sorted(group[1:], key=lambda candidate: (-candidate["similarity"], candidate["candidate_id"]))
        for position, candidate in enumerate([group[0], *order]):
            candidate["rank"] = position


def _candidate(prompt_ids: list[int], text: str, token_ids: list[int], strategy: str) -> dict[str, Any]:
    identity = candidate_id(prompt_ids, token_ids)
    return {"candidate_id": identity, "text": text, "token_ids": token_ids, "strategy": strategy,
            "similarity": None, "truncated": None, "rank": None}  # fmt: skip


def _refusal(row: dict[str, Any], reason: str) -> dict[str, Any]:
    source = f"{row['strategy']}:{row['sample_index']}"
    return {"source": source, "example_id": row["example_id"], "reason": reason, "detail": row["text"][:200]}


def dropped_reasons(dropped: Rows, example_ids: Sequence[str]) -> Counter[str]:
    """How many negatives of these examples were dropped, by reason."""
    reasons: Counter[str] = Counter()
    for table in dropped.batches(example_ids, columns=["reason"]):
        reasons.update(table["reason"].to_pylist())
    return reasons


@dataclass
class _Kept:
    """What is in groups."""

    sizes: Counter[int] = field(default_factory=Counter)
    """How many groups have K candidates, by K."""
    truncated: int = 0
    """Candidates that are longer than the embedding model's window."""
    tied: int = 0
    """Negatives whose cosine equals that of another one of their group."""

    @property
    def candidates(self) -> int:
        """Candidates of all groups, targets counted."""
        return sum(size * count for size, count in self.sizes.items())


def _count_kept(groups: Rows, example_ids: list[str]) -> _Kept:
    kept = _Kept()
    for table in groups.batches(example_ids, columns=["candidates"]):
        lists = table["candidates"].combine_chunks()
        rows, group = lists.flatten(), pc.list_parent_indices(lists).to_numpy()
        negative = np.diff(group, prepend=-1) == 0  # the target is the first of each group
        cosines = np.asarray(rows.field("similarity").to_numpy(zero_copy_only=False), np.float64)
        kept.sizes.update(pc.list_value_length(lists).to_pylist())
        kept.truncated += pc.sum(rows.field("truncated")).as_py() or 0
        kept.tied += int(tied(cosines[negative], group[negative]).sum())
    return kept


def _summarize(groups: Rows, kept: _Kept, dropped: Counter[str]) -> None:
    total = sum(kept.sizes.values())
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
    alone = f"; {kept.sizes[1]} groups have no negative left and leave the listwise loss" if kept.sizes[1] else ""
    ties = f"; {kept.tied} negatives have the cosine of another one of their group" if kept.tied else ""
    log.info("groups: %d in %s, K %.2f on average; dropped: %s%s%s",
             total, groups.name, kept.candidates / max(total, 1), reasons or "none", alone, ties)  # fmt: skip
