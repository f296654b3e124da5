"""Stage `rank`: groups of candidates, in the order of their similarity to the target (§3, "ranking")."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.embedding import Embedder, locate_embedder
from cpo_pipe.data.errors import MissingInput
from cpo_pipe.data.fingerprint import Spec, candidate_id
from cpo_pipe.data.progress import track
from cpo_pipe.data.recipe import Rank
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.generate import Sources

log = logging.getLogger(__name__)

COPY = "copy of the target"
DUPLICATE = "duplicate of another negative"

SLICE = 512
"""Examples whose negatives are read together."""


def plan_groups(config: Rank, ranked: bool, store: Store, sources: Sources) -> tuple[Rows, Rows, Embedder | None]:
    """The groups' artifact, that of the dropped negatives, and the embedding model (None: unranked). Makes nothing."""
    embedder = locate_embedder(config.model, store) if ranked else None
    spec: Spec = {
        "candidates": sources.spec(),
        "embedder": embedder.fingerprint if embedder else None,
        "drop_duplicates": config.drop_duplicates,
    }
    return store.rows("groups", spec), store.rows("rejected", {"of": spec}), embedder


def rank(config: Rank, ranked: bool, store: Store, sources: Sources) -> Rows:
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
            _make(config, embedder, sources, groups, dropped)
    sizes = _sizes(groups, example_ids)
    negatives = sum(pool.count for pool in sources.pools)
    lost = len(example_ids) * (negatives + 1) - sum(size * count for size, count in sizes.items())
    if dropped.read(example_ids, ["source"]).num_rows < lost:  # a shard of the reasons was damaged
        with dropped.lock():
            _explain_again(config, sources, dropped)
    _summarize(groups, sizes, dropped_reasons(dropped, example_ids))
    return groups


def _make(config: Rank, embedder: Embedder | None, sources: Sources, groups: Rows, dropped: Rows) -> None:
    missing = groups.missing(sources.selection.select(["example_id"]))["example_id"]
    selection = sources.selection.filter(pc.is_in(sources.selection["example_id"], missing.combine_chunks()))
    # The reasons are recorded before the groups: a group that is there has its reasons.
    with dropped.writer() as drops, groups.writer(after=drops) as writer, track("rank", len(missing)) as meter:
        for start in range(0, selection.num_rows, SLICE):
            examples = selection.slice(start, SLICE).to_pylist()
            kept, refused = collect_candidates(examples, sources, config.drop_duplicates)
            drops.add(refused)
            for first in range(0, len(examples), config.batch_size):
                part = slice(first, first + config.batch_size)
                if embedder is not None:
                    add_ranks(kept[part], embedder)
                writer.add(
                    [
                        {"example_id": e["example_id"], "prompt_ids": e["prompt_ids"], "candidates": candidates}
                        for e, candidates in zip(examples[part], kept[part], strict=True)
                    ]
                )
                meter.advance(len(kept[part]))


def _explain_again(config: Rank, sources: Sources, dropped: Rows) -> None:
    """Record the reasons that are missing; the groups they belong to are there."""
    for start in range(0, sources.selection.num_rows, SLICE):
        examples = sources.selection.slice(start, SLICE).to_pylist()
        _, refused = collect_candidates(examples, sources, config.drop_duplicates)
        rows = pa.Table.from_pylist(refused, schema=dropped.schema)
        missing = dropped.missing(rows.select(list(dropped.key)))
        dropped.append(rows.join(missing, keys=list(dropped.key), join_type="inner"))


def collect_candidates(
    examples: Sequence[dict[str, Any]], sources: Sources, drop_duplicates: bool
) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Candidates of each example, target first, unranked, and the rows of the negatives that were dropped."""
    negatives: dict[str, list[dict[str, Any]]] = {example["example_id"]: [] for example in examples}
    for pool in sources.pools:
        table = pool.rows.read(list(negatives), ["example_id", "sample_index", "strategy", "text", "token_ids"])
        for row in table.filter(pc.less(table["sample_index"], pool.count)).to_pylist():
            negatives[row["example_id"]].append(row)
    kept: list[list[dict[str, Any]]] = []
    refused: list[dict[str, Any]] = []
    for example in examples:
        prompt_ids, target = example["prompt_ids"], tuple(example["target_ids"])
        candidates = [_candidate(prompt_ids, example["target"], example["target_ids"], "target")]
        seen = {target}
        for row in negatives[example["example_id"]]:
            ids = tuple(row["token_ids"])
            if drop_duplicates and ids in seen:
                refused.append(_refusal(row, COPY if ids == target else DUPLICATE))
                continue
            seen.add(ids)
            candidates.append(_candidate(prompt_ids, row["text"], row["token_ids"], row["strategy"]))
        kept.append(candidates)
    return kept, refused


def add_ranks(groups: Sequence[list[dict[str, Any]]], embedder: Embedder) -> None:
    """Set `similarity` and `rank` in place: the target is rank 0, then by falling cosine, ties by candidate id."""
    vectors = embedder.encode([candidate["text"] for group in groups for candidate in group])
    start = 0
    for group in groups:
        cosines = vectors[start : start + len(group)] @ vectors[start]
        start += len(group)
        for candidate, cosine in zip(group, cosines, strict=True):
            candidate["similarity"] = min(1.0, max(-1.0, float(cosine)))
        order = sorted(group[1:], key=lambda candidate: (-candidate["similarity"], candidate["candidate_id"]))
        for position, candidate in enumerate([group[0], *order]):
            candidate["rank"] = position


def _candidate(prompt_ids: list[int], text: str, token_ids: list[int], strategy: str) -> dict[str, Any]:
    identity = candidate_id(prompt_ids, token_ids)
    return {"candidate_id": identity, "text": text, "token_ids": token_ids, "strategy": strategy,
            "similarity": None, "rank": None}  # fmt: skip


def _refusal(row: dict[str, Any], reason: str) -> dict[str, Any]:
    source = f"{row['strategy']}:{row['sample_index']}"
    return {"source": source, "example_id": row["example_id"], "reason": reason, "detail": row["text"][:200]}


def dropped_reasons(dropped: Rows, example_ids: Sequence[str]) -> Counter[str]:
    """How many negatives of these examples were dropped, by reason."""
    return Counter(dropped.read(example_ids, ["reason"])["reason"].to_pylist())


def _sizes(groups: Rows, example_ids: list[str]) -> Counter[int]:
    """How many groups have K candidates, by K."""
    return Counter(
        size
        for table in groups.batches(example_ids, columns=["candidates"])
        for size in pc.list_value_length(table["candidates"]).to_pylist()
    )


def _summarize(groups: Rows, sizes: Counter[int], dropped: Counter[str]) -> None:
    total = sum(sizes.values())
    mean = sum(size * count for size, count in sizes.items()) / max(total, 1)
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
    alone = f"; {sizes[1]} groups have no negative left and leave the listwise loss" if sizes[1] else ""
    log.info("groups: %d in %s, K %.2f on average; dropped: %s%s", total, groups.name, mean, reasons or "none", alone)
