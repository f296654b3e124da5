"""How good a run's negatives are: what would make a training on them pointless, seen before it is paid for.

Negatives are degenerate where they are too easy (a rule that reads neither text tells them from the target), too near
(copies), too poor (the same phrases everywhere) or too few (dropped). Shapes: G groups of a slice, C their
candidates.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.embedding import tied
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows

TARGET = "target"
"""The row of the targets themselves, for comparison; in groups the strategy of the target."""
ALL = "all"
"""The row of all strategies together."""

SLICE = 1024
"""Examples that are read together."""
DISTINCT_TOKENS = 10_000
"""Tokens that distinct-n is taken over, at most: it falls with their number, so figures over unlike numbers mislead."""
DISTINCT_GROUPS = 1024
"""Groups that these tokens are looked for in."""

SIMILARITY_EDGES = np.linspace(-1, 1, 41)
RATIO_EDGES = np.exp2((np.arange(-16, 18) - 0.5) / 4)
"""Quarters of an octave from 1/16 to 16, the middle one around 1; what lies beyond counts in the outermost."""

EASY = 0.9
"""A rule that reads no text is right, or wrong, in more pairs than this: at most one in ten teaches anything else."""
LOST = 0.5
"""More than half of the sampling was for nothing."""
ALONE = 0.1
"""One prompt in ten leaves the listwise loss, and not at random: those that the generator answers best."""
RATIO = (0.5, 2.0)
"""Half the negatives are of another order of length than the target: rewards, which are sums over tokens, are too."""
UNENDED = 0.5
"""For most negatives the absence of the end token alone says that they are no target."""
TRUNCATED = 0.01
"""Share of texts longer than the embedding model reads; `rank` counts fewer, too."""
TIED = 0.1
"""One negative in ten has no place of its own in the order."""
POOR = 0.5
"""Distinct 2-grams by the targets' own: half of the variety is gone."""

_BINS = pa.list_(pa.struct([("low", pa.float64()), ("high", pa.float64()), ("count", pa.int64())]))


def _column(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    return pa.field(name, kind, metadata={"doc": doc})


def _columns(kind: pa.DataType, docs: Mapping[str, str]) -> list[pa.Field]:
    return [_column(name, kind, doc) for name, doc in docs.items()]


_RULE = "how often {} is the target: of pairs of the target with a negative; a tie counts half"
_RULE_GROUPS = "how often {} is the target: of groups of the target with all these negatives; ties share"

QUALITY = pa.schema(
    [
        _column(
            "strategy", pa.string(), "strategy of the negatives, `all` of them, or `target`: the targets themselves"
        ),
        *_columns(pa.int64(), {"made": "negatives that were made", "kept": "those that are in groups"}),
        *_columns(
            pa.float64(),
            {
                "copies": "share of those made that equal the target, token by token but for the one that ends them",
                "duplicates": "share of those made that equal an earlier negative of their group, in the same way",
                "unended": "share of those made that ran into the limit or were cut, so that no end token follows",
                "sampler_logprob": "log-prob of those made under the raw model that sampled them, nats per token",
                "alone": "share of groups in which none was kept; of all negatives: those with K = 1",
                "tokens": "mean length of those kept, in tokens as trained on, with the end token",
                "length_ratio": "length of those kept by their target's, median",
                "longer": _RULE.format("the longer one"),
                "longest": _RULE_GROUPS.format("the longest one"),
                "likelier": _RULE.format("the one likelier under the reference model (log-probs summed)"),
                "likeliest": _RULE_GROUPS.format("the likeliest one (log-probs summed)"),
                "likelier_per_token": _RULE.format("the one likelier per token"),
                "likeliest_per_token": _RULE_GROUPS.format("the likeliest one per token"),
                "chance": "how often a blind guess would be the target, in the same groups: the mean of 1/K",
                "reference_logprob": "log-prob under the reference model, nats per token",
                "similarity": "cosine to the target, mean",
                "similarity_p10": "cosine to the target that a tenth stay below",
                "similarity_p50": "cosine to the target, median",
                "similarity_p90": "cosine to the target that a tenth are above",
                "truncated": "share of those kept that are longer than the embedding model's window",
                "tied": "share of those kept whose cosine equals that of another negative of their group",
            },
        ),
        *(
            _column(f"{whose}distinct_{n}", pa.float64(), f"different {n}-grams by all {n}-grams of {texts}")
            for whose, texts in (
                ("", "one negative a group"),
                ("target_", "the targets of the same groups, on as many tokens"),
            )
            for n in (1, 2, 3)
        ),
        _column("distinct_tokens", pa.int64(), "number of tokens that distinct-n is taken over"),
        _column("group_sizes", pa.list_(pa.int64()), "at place j the groups in which j were kept (K = j + 1 of all)"),
        _column("length_ratio_histogram", _BINS, "negatives by their length over the target's"),
        _column("similarity_histogram", _BINS, "negatives by their cosine to the target"),
    ]
)


class Pool(Protocol):
    """The negatives of one strategy, or of one pool."""

    @property
    def label(self) -> str:
        """As groups name them."""

    @property
    def rows(self) -> Rows:
        """Their artifact."""

    @property
    def count(self) -> int:
        """How many of each example a group takes."""


@dataclass(frozen=True)
class Quality:
    """What was measured of a run's negatives."""

    table: pa.Table
    """A row per strategy, then `all` and `target` (QUALITY schema); what does not apply or is not known is null."""
    notes: list[str]
    """What is degenerate, a sentence each, and what could not be measured."""


def measure_quality(selection: pa.Table, pools: Sequence[Pool], groups: Rows, reference: Rows | None = None) -> Quality:
    """Measure negatives, as made and as kept. Reads a slice at a time and keeps eight bytes of each kept negative.

    Args:
        selection: the examples of the groups (EXAMPLES schema).
        pools: the negatives, in the order in which `rank` takes them; all made.
        groups: one group of each example, all made.
        reference: log π_ref of their candidates, if there is any; groups without are left out of the figures on it.
    """
    tally = _Tally([pool.label for pool in pools])
    ids = selection["example_id"].to_pylist()
    columns = ["example_id", "sample_index", "token_ids", "finish_reason", "logprob"]
    slices = zip(
        range(0, len(ids), SLICE),
        zip(*(pool.rows.batches(ids, SLICE, columns) for pool in pools), strict=True),
        groups.batches(ids, SLICE, ["candidates"]),
        repeat(None) if reference is None else reference.batches(ids, SLICE, ["candidate_id", "logprob"]),
        strict=False,  # of log-probs that are not there, there is None for ever
    )
    with track("quality", len(ids)) as meter:
        for start, made, kept, logprobs in slices:
            examples = selection.slice(start, SLICE)
            _measure_made(tally, examples, zip(pools, made, strict=True))
            _measure_kept(tally, _candidates(kept, tally.labels), logprobs)
            meter.advance(examples.num_rows)
    # Example ids are hashes: the smallest are a random sample, and the same one each time.
    variety = _variety(groups.read(sorted(ids)[:DISTINCT_GROUPS], ["candidates"]), tally.labels)
    table = pa.Table.from_pylist([tally.row(name) | variety[name] for name in tally.names], schema=QUALITY)
    notes = list(degeneracies(table)) or ["Nothing degenerate was found in the negatives."]
    measured, compared = tally.known("likeliest", ALL), tally.known("longest", ALL)
    if measured < compared:
        some = f"{measured} of {compared}" if measured else "none"
        notes.append(
            f"Log-probs under the reference model are there for {some} of the groups: `cpo-pipe train` makes them, "
            "and with them the figures on which candidate is likelier."
        )
    return Quality(table, notes)


class _Tally:
    """Sums of figures over strategies and slices; NaN stands for what is not known and is left out."""

    def __init__(self, labels: Sequence[str]):
        self.labels = labels
        self.names = [*labels, ALL, TARGET]
        self._sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._known: Counter[tuple[str, str]] = Counter()
        self._sizes: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._values: defaultdict[tuple[str, str], list[NDArray[np.float32]]] = defaultdict(list)

    def add(self, figure: str, name: str, values: NDArray[Any]) -> None:
        """Count values of a strategy's negatives or groups."""
        known = values[~np.isnan(values)]
        self._sums[figure, name] += float(known.sum(dtype=np.float64))
        self._known[figure, name] += len(known)

    def keep(self, figure: str, label: str, values: NDArray[Any]) -> None:
        """Keep each value, for quantiles."""
        self._values[figure, label].append(values[~np.isnan(values)].astype(np.float32))

    def add_sizes(self, name: str, sizes: NDArray[Any]) -> None:
        """Count how many negatives groups have."""
        self._sizes[name].update(sizes.tolist())

    def known(self, figure: str, name: str) -> int:
        """How many values a figure is taken of."""
        return self._known[figure, name]

    def row(self, name: str) -> dict[str, Any]:
        """A strategy's figures."""
        sizes = self._sizes[name]
        ratios, cosines = self._all_values("length_ratio", name), self._all_values("similarity", name)
        means = ("copies", "duplicates", "unended", "tokens", "longer", "longest", "likelier", "likeliest",
                 "likelier_per_token", "likeliest_per_token", "chance", "similarity", "truncated", "tied")  # fmt: skip
        deciles = np.quantile(cosines, [0.1, 0.5, 0.9]).tolist() if len(cosines) else [None] * 3
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
            "similarity_histogram": _bins(cosines, SIMILARITY_EDGES),
        }

    def _mean(self, figure: str, name: str) -> float | None:
        return self._sums[figure, name] / self._known[figure, name] if self._known[figure, name] else None

    def _ratio(self, over: str, under: str, name: str) -> float | None:
        return self._sums[over, name] / self._sums[under, name] if self._sums[under, name] else None

    def _all_values(self, figure: str, name: str) -> NDArray[np.float32]:
        names = self.labels if name == ALL else [name]
        return np.concatenate([np.empty(0, np.float32), *(part for one in names for part in self._values[figure, one])])


def _measure_made(tally: _Tally, examples: pa.Table, made: Iterable[tuple[Pool, pa.Table]]) -> None:
    """Count copies and duplicates, and how samples ended, whatever was dropped of them later."""
    ids = examples["example_id"].combine_chunks()
    targets = _token_bytes(examples["target_ids"], examples["ends"])
    seen = [{target} for target in targets]
    for pool, table in made:
        rows = table.filter(pc.less(table["sample_index"], pool.count))
        copies, duplicates = np.zeros((2, rows.num_rows))
        places = pc.index_in(rows["example_id"], value_set=ids).to_pylist()
        texts = _token_bytes(rows["token_ids"], pc.equal(rows["finish_reason"], "stop"))
        for row, (group, tokens) in enumerate(zip(places, texts, strict=True)):
            copies[row] = tokens == targets[group]
            duplicates[row] = tokens in seen[group] and not copies[row]
            seen[group].add(tokens)
        nats = _numbers(rows["logprob"])
        lengths = pc.list_value_length(rows["token_ids"]).to_numpy()
        for name in (pool.label, ALL):
            tally.add("copies", name, copies)
            tally.add("duplicates", name, duplicates)
            tally.add("unended", name, pc.equal(rows["finish_reason"], "length").to_numpy().astype(np.float64))
            tally.add("sampler_nats", name, nats)
            tally.add("sampler_tokens", name, np.where(np.isnan(nats), np.nan, lengths))
    tally.add("unended", TARGET, 1.0 - examples["ends"].to_numpy())


@dataclass(frozen=True)
class _Candidates:
    """The candidates of groups, one after the other."""

    rows: pa.StructArray
    group_C: NDArray[np.int64]
    groups: int
    masks: dict[str, NDArray[np.bool_]]
    """Which are a strategy's, which are negatives (`all`), which are targets: (C,) each."""
    target_C: NDArray[np.int64]
    """Where the target of each one's group stands."""

    def column(self, name: str) -> pa.Array:
        """A field of each candidate."""
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
    """Return 1 for each negative whose cosine equals that of another one of its group, else 0; NaN if unknown: (C,)."""
    negative = found.masks[ALL]
    ties = np.full(len(similarity), np.nan)
    ties[negative] = tied(similarity[negative], found.group_C[negative])
    return np.where(np.isnan(similarity), np.nan, ties)


def _chosen(lead: NDArray[Any], group: NDArray[Any], groups: int) -> NDArray[np.float64]:
    """The share of a choice that falls to each group's target: all if it leads, its part of a tie, none: (G,)."""
    behind, tied, unknown = (
        np.bincount(group, weights=condition, minlength=groups) for condition in (lead < 0, lead == 0, np.isnan(lead))
    )
    return np.where(unknown > 0, np.nan, (behind == 0) / (1 + tied))


def _reference(found: _Candidates, logprobs: pa.Table | None) -> NDArray[np.float64]:
    """Log π_ref of candidates, in nats; NaN in all of a group of which one is missing: (C,)."""
    if logprobs is None:
        return np.full(len(found.rows), np.nan)
    place = pc.index_in(found.column("candidate_id"), value_set=logprobs["candidate_id"].combine_chunks())
    nats = _numbers(logprobs["logprob"].take(place))
    incomplete = np.bincount(found.group_C, weights=np.isnan(nats)) > 0
    return np.where(incomplete[found.group_C], np.nan, nats)


def _variety(groups: pa.Table, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Distinct-n (Li et al. 2016) of one negative a group, beside the targets' of the same groups, by strategy.

    One a group, because those of one prompt are alike by nature: the comparison is that of as many texts.
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
            f"{whose}distinct_{n}": _distinct(part, n, tokens) for whose, part in texts.items() for n in (1, 2, 3)
        }
        variety[name] = {**distinct, "distinct_tokens": tokens}
    return variety


def _distinct(texts: Sequence[Sequence[int]], n: int, tokens: int) -> float | None:
    """Different n-grams by all n-grams of the first `tokens` tokens of texts; none goes over the end of a text."""
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
    """Return token ids without the one that ends each text, as bytes, which compare and hash at once."""
    lists = column.combine_chunks()
    ids, ends = lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy().cumsum()
    parts = np.split(ids, ends[:-1]) if len(lists) else []
    return [part[: len(part) - end].tobytes() for part, end in zip(parts, ended.to_pylist(), strict=True)]


def _numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[np.float64]:
    """Values as floats, null as NaN."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(array.cast(pa.float64()).to_numpy(zero_copy_only=False))


# ── degeneracies ──────────────────────────────────────────────────────────────────────────────────────────────────


def degeneracies(table: pa.Table) -> Iterator[str]:
    """What makes negatives (QUALITY schema) degenerate, what it means for a training, and what to change."""
    rows = {row["strategy"]: row for row in table.to_pylist()}
    target, together = rows.pop(TARGET), rows.pop(ALL)
    for name, row in rows.items():
        for sentence in (_wasted(row), _length(row, target), _likelihood(row), _poverty(row), _order(row, target)):
            yield from (f"{name}: {text}" for text in sentence)
    if (together["alone"] or 0) > ALONE:
        yield (
            f"{together['alone']:.0%} of the groups have no negative left (K = 1) and leave the listwise loss: "
            "training sees only the prompts that the generator finds hard; raise negatives.counts or "
            "negatives.temperature, or add a strategy that does not copy the target, such as batch."
        )


def _wasted(row: Mapping[str, Any]) -> Iterator[str]:
    if (row["copies"] or 0) > LOST:
        yield (
            f"{row['copies']:.0%} of the negatives are copies of the target: the generator knows these answers, and "
            "groups shrink (or, with rank.drop_duplicates: false, the target is trained against itself); raise "
            "negatives.temperature or top_k, or ask for another strategy."
        )
    if (row["duplicates"] or 0) > LOST:
        yield (
            f"{row['duplicates']:.0%} of the negatives repeat another one of their group: K stays far below what the "
            "recipe asks for; raise negatives.temperature or top_k, or lower the count."
        )


def _length(row: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    unended, ratio = row["unended"] or 0, 1 if row["length_ratio"] is None else row["length_ratio"]
    stops, limit = "take a generator that was trained on such targets", "raise negatives.max_new_tokens"
    if unended > UNENDED >= target["unended"]:
        yield (
            f"{unended:.0%} of the negatives have no end token, {target['unended']:.0%} of the targets have none: that "
            f"token alone tells them apart, and training teaches to stop early; {limit if ratio < 1 else stops}."
        )
    if not RATIO[0] <= ratio <= RATIO[1]:
        yield (
            f"the median negative has {ratio:.2f} times the length of its target: rewards are sums over tokens, so the "
            "longer side decides them; set train.*.length_normalize, or ask for negatives of the target's length "
            "(meanfield)."
        )
    if _is_easy(row["longer"]):
        rule, change = ("longer", f"{limit} if they run into it") if row["longer"] > EASY else ("shorter", stops)
        yield (
            f"the {rule} one is the target in {_share(row['longer'])} of the pairs: training can win by length alone, "
            f"and teaches to write {rule} texts; {change}, or keep these few beside others."
        )


def _likelihood(row: Mapping[str, Any]) -> Iterator[str]:
    # A sum over tokens follows the length: where that is all, it has been said.
    rules = ["likelier_per_token"] if _is_easy(row["longer"]) else ["likelier", "likelier_per_token"]
    rule = next((rule for rule in rules if _is_easy(row[rule])), None)
    if rule is None:
        return
    share, likelier = row[rule], rule.replace("_", " ")
    if share > EASY:
        yield (
            f"the reference model already finds the target {likelier} in {_share(share)} of the pairs: training can "
            "win by making it surer of what it believes; take harder negatives (autoregressive, with a lower "
            "temperature or top_k), or keep these few beside others."
        )
    else:
        yield (
            f"the reference model finds the negative {likelier} in {_share(share)} of the pairs: training can win by "
            "making all likely text less likely; raise negatives.temperature or top_k (0 is the model's own "
            "distribution), and set train.*.mle_weight."
        )


def _is_easy(share: float | None) -> bool:
    """Whether a rule, or its opposite, is nearly always right."""
    return share is not None and not 1 - EASY <= share <= EASY


def _share(share: float) -> str:
    return f"{max(share, 1 - share):.0%}"


def _poverty(row: Mapping[str, Any]) -> Iterator[str]:
    own, targets = row["distinct_2"], row["target_distinct_2"]
    if own is not None and targets is not None and own < POOR * targets:
        yield (
            f"distinct-2 is {own:.2f}, the targets' is {targets:.2f}: the negatives say the same everywhere, and "
            "training can win by avoiding a few phrases; raise negatives.temperature or top_k, or mix strategies."
        )


def _order(row: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    own, targets = row["truncated"] or 0, target["truncated"] or 0
    if max(own, targets) > TRUNCATED:
        yield (
            f"{own:.1%} of the negatives and {targets:.1%} of the targets are longer than the embedding model reads: "
            "similarity and rank ignore how they go on; set rank.model to a model that reads more, or shorten the "
            "texts."
        )
    if (row["tied"] or 0) > TIED:
        yield (
            f"{row['tied']:.0%} of the negatives have the cosine of another one of their group: the order among these "
            "is arbitrary, and cpo-ranked learns it; set rank.model to a model that tells them apart, or train with "
            "cpo."
        )
