"""Figures of a run's negatives: how many are copies, how long, how likely, how similar and how varied they are.

They show before a training is paid for whether its negatives are useful: not too easy (a rule that reads neither text
separates them from the target), not copies, not the same phrases everywhere, and not too few.

Shapes: G groups of a slice, C candidates of these groups.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.models.embedder import tied
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.negatives.config import TARGET
from cpo_pipe.pipeline.negatives.strategy import Source
from cpo_pipe.pipeline.quality.schema import ALL, QUALITY
from cpo_pipe.pipeline.quality.warnings import quality_warnings
from cpo_pipe.pipeline.scorers.correct import CORRECT

SLICE = 1024
"""Examples that are read together."""
DISTINCT_TOKENS = 10_000
"""Largest number of tokens that distinct-n is computed on. It falls with their number, so that values over different
numbers of tokens cannot be compared."""
DISTINCT_GROUPS = 1024
"""Groups that these tokens are taken from."""

SIMILARITY_EDGES = np.linspace(-1, 1, 41)
RATIO_EDGES = np.exp2((np.arange(-16, 18) - 0.5) / 4)
"""Quarters of an octave from 1/16 to 16, the middle one around 1. Values outside count in the first or last bin."""


@dataclass(frozen=True)
class Quality:
    """Figures and warnings about a run's negatives."""

    table: pa.Table
    """A row per source, then ALL and TARGET (QUALITY schema); null where a figure does not apply or is unknown."""
    notes: list[str]
    """Warnings, one sentence each, and what could not be measured."""


def measure_quality(
    selection: pa.Table,
    sources: Sequence[Source],
    groups: Rows,
    reference: Rows | None = None,
    dropped: Rows | None = None,
) -> Quality:
    """Measure negatives, as made and as kept. Read a slice at a time and keep eight bytes of each kept negative.

    Args:
        selection: the examples of the groups (EXAMPLES schema).
        sources: the negatives of each source, in the order in which `rank` takes them; complete.
        groups: the groups of all examples; complete.
        reference: log π_ref of the candidates, if any. Figures about it omit groups without it.
        dropped: the negatives that `rank` dropped, with the reasons (REJECTED schema), if it drops correct ones.
    """
    tally = _Tally([source.label for source in sources])
    ids = selection["example_id"].to_pylist()
    columns = ["example_id", "sample_index", "token_ids", "finish_reason", "logprob"]
    slices = zip(
        range(0, len(ids), SLICE),
        zip(*(source.rows.batches(ids, SLICE, columns) for source in sources), strict=True),
        groups.batches(ids, SLICE, ["candidates"]),
        repeat(None) if dropped is None else dropped.batches(ids, SLICE, ["source", "reason"]),
        repeat(None) if reference is None else reference.batches(ids, SLICE, ["candidate_id", "logprob"]),
        strict=False,  # `repeat` never ends
    )
    with track("quality of the negatives", len(ids), "examples") as meter:
        for start, made, kept, refused, logprobs in slices:
            examples = selection.slice(start, SLICE)
            _measure_made(tally, examples, zip(sources, made, strict=True), refused)
            _measure_kept(tally, _candidates(kept, tally.labels), logprobs)
            meter.advance(examples.num_rows)
    # Example ids are hashes: the smallest are a random sample that stays the same.
    variety = _variety(groups.read(sorted(ids)[:DISTINCT_GROUPS], ["candidates"]), tally.labels)
    table = pa.Table.from_pylist([tally.row(name) | variety[name] for name in tally.names], schema=QUALITY)
    notes = list(quality_warnings(table)) or ["No problem was found in the negatives."]
    measured, compared = tally.known("likeliest", ALL), tally.known("longest", ALL)
    if measured < compared:
        some = f"{measured} of {compared}" if measured else "none"
        notes.append(
            f"Log-probs under the reference model exist for {some} of the groups: run `cpo-pipe train` to compute them "
            "and the figures about which candidate is likelier."
        )
    return Quality(table, notes)


class _Tally:
    """Sums of figures over sources and slices; NaN is an unknown value and is omitted."""

    def __init__(self, labels: Sequence[str]):
        self.labels = labels
        self.names = [*labels, ALL, TARGET]
        self._sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._known: Counter[tuple[str, str]] = Counter()
        self._sizes: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._values: defaultdict[tuple[str, str], list[NDArray[np.float32]]] = defaultdict(list)

    def add(self, figure: str, name: str, values: NDArray[Any]) -> None:
        """Add values of a source's negatives or groups."""
        known = values[~np.isnan(values)]
        self._sums[figure, name] += float(known.sum(dtype=np.float64))
        self._known[figure, name] += len(known)

    def keep(self, figure: str, label: str, values: NDArray[Any]) -> None:
        """Keep each value, for quantiles and histograms."""
        self._values[figure, label].append(values[~np.isnan(values)].astype(np.float32))

    def add_sizes(self, name: str, sizes: NDArray[Any]) -> None:
        """Count groups by their number of negatives."""
        self._sizes[name].update(sizes.tolist())

    def known(self, figure: str, name: str) -> int:
        """Return how many values of a figure are known."""
        return self._known[figure, name]

    def row(self, name: str) -> dict[str, Any]:
        """Return a source's figures, except for distinct-n."""
        sizes = self._sizes[name]
        ratios, scores = self._all_values("length_ratio", name), self._all_values("similarity", name)
        means = ("copies", "duplicates", "correct", "unended", "tokens", "longer", "longest", "likelier", "likeliest",
                 "likelier_per_token", "likeliest_per_token", "chance", "similarity", "truncated", "tied")  # fmt: skip
        deciles = np.quantile(scores, [0.1, 0.5, 0.9]).tolist() if len(scores) else [None] * 3
        return {
            "strategy": name,
            "made": self.known("unended", name),
            "kept": self.known("tokens", name),
            **{figure: self._mean(figure, name) for figure in means},
            "sampler_logprob": self._ratio("sampler_nats", "sampler_tokens", name),
            "reference_logprob": self._ratio("reference_nats", "reference_tokens", name),
            "alone": sizes[0] / sizes.total() if sizes else None,
            "length_ratio": float(np.median(ratios)) if len(ratios) else None,
            **dict(zip(("similarity_p10", "similarity_p50", "similarity_p90"), deciles, strict=True)),
            "group_sizes": [sizes[size] for size in range(max(sizes) + 1)] if sizes else None,
            "length_ratio_histogram": _bins(ratios, RATIO_EDGES),
            "similarity_histogram": _bins(scores, self._score_edges()),
        }

    def _mean(self, figure: str, name: str) -> float | None:
        return self._sums[figure, name] / self._known[figure, name] if self._known[figure, name] else None

    def _ratio(self, over: str, under: str, name: str) -> float | None:
        return self._sums[over, name] / self._sums[under, name] if self._sums[under, name] else None

    def _score_edges(self) -> NDArray[np.float64]:
        """Return the bins of the scores: those of cosines, unless some score is no cosine, as rewards are."""
        scores = self._all_values("similarity", ALL)
        if not len(scores) or np.abs(scores).max() <= 1:
            return SIMILARITY_EDGES
        return np.linspace(scores.min(), scores.max(), len(SIMILARITY_EDGES))

    def _all_values(self, figure: str, name: str) -> NDArray[np.float32]:
        names = self.labels if name == ALL else [name]
        return np.concatenate([np.empty(0, np.float32), *(part for one in names for part in self._values[figure, one])])


def _measure_made(
    tally: _Tally, examples: pa.Table, made: Iterable[tuple[Source, pa.Table]], dropped: pa.Table | None
) -> None:
    """Count copies, duplicates, correct ones and missing end tokens of all samples, also of those that `rank` dropped.

    Which are correct is known only of those that were dropped for it.
    """
    correct = (
        dropped.filter(pc.starts_with(dropped["reason"], CORRECT))["source"].to_pylist() if dropped is not None else []
    )
    correct_of = Counter(place.rpartition(":")[0] for place in correct)
    ids = examples["example_id"].combine_chunks()
    targets = _token_bytes(examples["target_ids"], examples["ends"])
    seen = [{target} for target in targets]
    for source, table in made:
        rows = table.filter(pc.less(table["sample_index"], source.count))
        copies, duplicates = np.zeros((2, rows.num_rows))
        places = pc.index_in(rows["example_id"], value_set=ids).to_pylist()
        texts = _token_bytes(rows["token_ids"], pc.equal(rows["finish_reason"], "stop"))
        for row, (group, tokens) in enumerate(zip(places, texts, strict=True)):
            copies[row] = tokens == targets[group]
            duplicates[row] = tokens in seen[group] and not copies[row]
            seen[group].add(tokens)
        right = (np.arange(rows.num_rows) < correct_of[source.label]).astype(np.float64)
        nats = _numbers(rows["logprob"])
        lengths = pc.list_value_length(rows["token_ids"]).to_numpy()
        for name in (source.label, ALL):
            tally.add("copies", name, copies)
            tally.add("duplicates", name, duplicates)
            if dropped is not None:
                tally.add("correct", name, right)
            tally.add("unended", name, pc.equal(rows["finish_reason"], "length").to_numpy().astype(np.float64))
            tally.add("sampler_nats", name, nats)
            tally.add("sampler_tokens", name, np.where(np.isnan(nats), np.nan, lengths))
    tally.add("unended", TARGET, 1.0 - examples["ends"].to_numpy())


@dataclass(frozen=True)
class _Candidates:
    """The candidates of groups in one array."""

    rows: pa.StructArray
    group_C: NDArray[np.int64]
    groups: int
    masks: dict[str, NDArray[np.bool_]]
    """Which candidates are a source's, which are negatives (ALL), which are targets: (C,) each."""
    target_C: NDArray[np.int64]
    """The place of the target of each candidate's group."""

    def column(self, name: str) -> pa.Array:
        """Return a field of each candidate."""
        return pc.struct_field(self.rows, name)


def _candidates(groups: pa.Table, labels: Sequence[str]) -> _Candidates:
    lists = groups["candidates"].combine_chunks()
    rows, group_C = lists.flatten(), pc.list_parent_indices(lists).to_numpy()
    strategy = pc.struct_field(rows, "strategy")
    masks = {name: pc.equal(strategy, name).to_numpy(zero_copy_only=False) for name in (*labels, TARGET)}
    targets = np.flatnonzero(masks[TARGET])
    return _Candidates(rows, group_C, len(lists), {**masks, ALL: ~masks[TARGET]}, targets[group_C])


def _measure_kept(tally: _Tally, found: _Candidates, logprobs: pa.Table | None) -> None:
    """Compare the candidates of each group with its target."""
    length = pc.list_value_length(found.column("token_ids")).to_numpy().astype(np.float64)
    ratio = length / np.maximum(length[found.target_C], 1)
    similarity = _numbers(found.column("similarity"))
    truncated, ties = _numbers(found.column("truncated")), _ties(similarity, found)
    nats = _reference(found, logprobs)
    for name, mask in found.masks.items():
        tally.add("tokens", name, length[mask])
        tally.add("reference_nats", name, nats[mask])
        tally.add("reference_tokens", name, np.where(np.isnan(nats), np.nan, length)[mask])
        tally.add("truncated", name, truncated[mask])
        if name == TARGET:
            continue
        tally.add("similarity", name, similarity[mask])
        tally.add("tied", name, ties[mask])
        sizes = np.bincount(found.group_C[mask], minlength=found.groups)
        tally.add_sizes(name, sizes)
        tally.add("chance", name, 1 / (1 + sizes[sizes > 0]))
        for pairs, groups, score in (
            ("longer", "longest", length),
            ("likelier", "likeliest", nats),
            ("likelier_per_token", "likeliest_per_token", nats / np.maximum(length, 1)),
        ):
            lead = (score[found.target_C] - score)[mask]
            tally.add(pairs, name, (np.sign(lead) + 1) / 2)
            tally.add(groups, name, _chosen(lead, found.group_C[mask], found.groups)[sizes > 0])
    for label in tally.labels:
        tally.keep("length_ratio", label, ratio[found.masks[label]])
        tally.keep("similarity", label, similarity[found.masks[label]])


def _ties(similarity: NDArray[np.float64], found: _Candidates) -> NDArray[np.float64]:
    """Return 1 for each negative whose score equals that of another one of its group, else 0; NaN if unknown: (C,)."""
    negative = found.masks[ALL]
    ties = np.full(len(similarity), np.nan)
    ties[negative] = tied(similarity[negative], found.group_C[negative])
    return np.where(np.isnan(similarity), np.nan, ties)


def _chosen(lead: NDArray[Any], group: NDArray[Any], groups: int) -> NDArray[np.float64]:
    """Return each target's share of the first place: 1 if it leads, its part of a tie, or 0; NaN if unknown: (G,)."""
    behind, tied, unknown = (
        np.bincount(group, weights=condition, minlength=groups) for condition in (lead < 0, lead == 0, np.isnan(lead))
    )
    return np.where(unknown > 0, np.nan, (behind == 0) / (1 + tied))


def _reference(found: _Candidates, logprobs: pa.Table | None) -> NDArray[np.float64]:
    """Return log π_ref of candidates, in nats; NaN in whole groups where one is missing: (C,)."""
    if logprobs is None:
        return np.full(len(found.rows), np.nan)
    place = pc.index_in(found.column("candidate_id"), value_set=logprobs["candidate_id"].combine_chunks())
    nats = _numbers(logprobs["logprob"].take(place))
    incomplete = np.bincount(found.group_C, weights=np.isnan(nats)) > 0
    return np.where(incomplete[found.group_C], np.nan, nats)


def _variety(groups: pa.Table, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return distinct-n (Li et al. 2016) by source, of one negative per group and of the same groups' targets.

    One per group, because negatives of one prompt resemble each other: both sides are then texts of different prompts.
    """
    found = _candidates(groups, labels)
    token_ids = found.column("token_ids")
    variety = {}
    for name, mask in found.masks.items():
        members = np.flatnonzero(mask)
        group, first, size = np.unique(found.group_C[members], return_index=True, return_counts=True)
        chosen = members[first + group % size]
        texts = {"": token_ids.take(pa.array(chosen)).to_pylist()}
        if name != TARGET:
            texts["target_"] = token_ids.take(pa.array(found.target_C[chosen])).to_pylist()
        tokens = min(DISTINCT_TOKENS, *(sum(map(len, part)) for part in texts.values()))
        distinct = {
            f"{prefix}distinct_{n}": _distinct(part, n, tokens) for prefix, part in texts.items() for n in (1, 2, 3)
        }
        variety[name] = {**distinct, "distinct_tokens": tokens}
    return variety


def _distinct(texts: Sequence[Sequence[int]], n: int, tokens: int) -> float | None:
    """Return distinct n-grams divided by all n-grams of the first `tokens` tokens; none spans two texts."""
    grams: list[tuple[int, ...]] = []
    for text in texts:
        part = text[:tokens]
        tokens -= len(part)
        grams += zip(*(part[start:] for start in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else None


def _bins(values: NDArray[np.float32], edges: NDArray[np.float64]) -> list[dict[str, float]] | None:
    if not len(values):
        return None
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    bins = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return [{"low": low, "high": high, "count": count} for low, high, count in bins]


def _token_bytes(column: pa.ChunkedArray, ended: pa.ChunkedArray) -> list[bytes]:
    """Return the token ids of each text without its end token, as bytes, which compare and hash quickly."""
    lists = column.combine_chunks()
    ids, ends = lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy().cumsum()
    parts = np.split(ids, ends[:-1]) if len(lists) else []
    return [part[: len(part) - end].tobytes() for part, end in zip(parts, ended.to_pylist(), strict=True)]


def _numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float64]:
    """Return values as floats, null as NaN."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(array.cast(pa.float64()).to_numpy(zero_copy_only=False))
