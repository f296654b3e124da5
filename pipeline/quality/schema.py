"""The schema of `quality.parquet`: one row per source of negatives, then `all` and, for comparison, `target`."""

from collections.abc import Mapping

import pyarrow as pa

ALL = "all"
"""The row of all negatives together."""

_BINS = pa.list_(pa.struct([("low", pa.float64()), ("high", pa.float64()), ("count", pa.int64())]))


def _column(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    return pa.field(name, kind, metadata={"doc": doc})


def _columns(kind: pa.DataType, docs: Mapping[str, str]) -> list[pa.Field]:
    return [_column(name, kind, doc) for name, doc in docs.items()]


_PAIRS = "share of pairs of the target with a negative in which the {} is the target; a tie counts half"
_GROUPS = "share of groups of the target with all these negatives in which the {} is the target; ties share"

QUALITY = pa.schema(
    [
        _column("strategy", pa.string(), "source of the negatives, `all` of them, or `target`: the targets themselves"),
        *_columns(pa.int64(), {"made": "negatives that were made", "kept": "negatives that are in groups"}),
        *_columns(
            pa.float64(),
            {
                "copies": "share of those made that equal the target, token by token except for the end token",
                "duplicates": "share of those made that equal an earlier negative of their group, in the same way",
                "correct": "share of those made that `negatives.drop_correct` removed from the groups",
                "unended": "share of those made that have no end token, because they reached the limit or were cut",
                "sampler_logprob": "log-prob of those made under the raw model that sampled them, nats per token",
                "alone": "share of groups that keep none of these negatives; in the row `all`: groups with K = 1",
                "tokens": "mean length of those kept, in tokens as trained on, with the end token",
                "length_ratio": "length of those kept divided by the length of their target, median",
                "longer": _PAIRS.format("longer text"),
                "longest": _GROUPS.format("longest text"),
                "likelier": _PAIRS.format("text with the higher log-prob under the reference model"),
                "likeliest": _GROUPS.format("text with the highest log-prob under the reference model"),
                "likelier_per_token": _PAIRS.format("text with the higher log-prob per token"),
                "likeliest_per_token": _GROUPS.format("text with the highest log-prob per token"),
                "chance": "share of the same groups in which a random guess is the target: the mean of 1/K",
                "reference_logprob": "log-prob under the reference model, nats per token",
                "similarity": "score of `rank.by` (of `embedding` the cosine to the target), mean",
                "similarity_p10": "score of `rank.by` (of `embedding` the cosine to the target), 10% quantile",
                "similarity_p50": "score of `rank.by` (of `embedding` the cosine to the target), median",
                "similarity_p90": "score of `rank.by` (of `embedding` the cosine to the target), 90% quantile",
                "truncated": "share of those kept that are longer than the ranking model's window",
                "tied": "share of those kept whose score equals that of another negative of their group",
            },
        ),
        *(
            _column(f"{prefix}distinct_{n}", pa.float64(), f"distinct {n}-grams divided by all {n}-grams of {texts}")
            for prefix, texts in (
                ("", "one negative per group"),
                ("target_", "the targets of the same groups, on the same number of tokens"),
            )
            for n in (1, 2, 3)
        ),
        _column("distinct_tokens", pa.int64(), "number of tokens that distinct-n is computed on"),
        _column(
            "group_sizes", pa.list_(pa.int64()), "element j: groups that keep j negatives (K = j + 1 in row `all`)"
        ),
        _column("length_ratio_histogram", _BINS, "negatives by their length divided by the target's"),
        _column("similarity_histogram", _BINS, "negatives by their score"),
    ]
)
