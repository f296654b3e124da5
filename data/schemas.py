"""Every Parquet table, each column with its meaning and unit. Row keys name the unit of reuse."""

from dataclasses import dataclass

import pyarrow as pa

_IDS = pa.list_(pa.int32())


def _column(name: str, kind: pa.DataType, doc: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


_EXAMPLE_ID = _column(
    "example_id", pa.string(), "hash of prompt, context and target, and of whether the target is a cut one"
)
_SAMPLE_INDEX = _column("sample_index", pa.int32(), "k of the k-th sample of its example, from 0")
_TOKEN_IDS = _column("token_ids", _IDS, "token ids; ends with an end token only where the text really ended")
_FINISH_REASON = _column("finish_reason", pa.string(), "`stop`: the text ended there; `length`: the limit was hit")
_SEED = _column("seed", pa.int64(), "seed of this sample")
_ENGINE = _column("engine", pa.string(), "provenance, not identity: engine, version, dtype")

_MESSAGE = _column(
    "message", pa.string(), "the answer as a message, as JSON; null without a chat template", nullable=True
)

_ANSWER = pa.struct(
    [
        _column("text", pa.string(), "the answer without special tokens"),
        _column("token_ids", _IDS, "token ids, with the token that ends it where `ends`"),
        _column("ends", pa.bool_(), "whether it was not cut to `data.max_target_tokens`"),
        _MESSAGE,
    ]
)

EXAMPLES = pa.schema(
    [
        _EXAMPLE_ID,
        _column("split", pa.string(), "`train`, `validation` or `test`"),
        _column(
            "prompt", pa.string(), "the prompt with its context, if any, as the source has them, before the template"
        ),
        _column("rendered", pa.string(), "the prompt as rendered by the template, which is what the model is given"),
        _column("target", pa.string(), "the ground-truth continuation"),
        _MESSAGE,
        _column("prompt_ids", _IDS, "token ids of the rendered prompt"),
        _column("target_ids", _IDS, "token ids of the target, with the token that ends it where `ends`"),
        _column("ends", pa.bool_(), "whether the text really ended there (not a cut article)"),
        _column("category", pa.string(), "the source's own category", nullable=True),
        _column("source", pa.string(), "name of its source in `data.sources`; null with one source", nullable=True),
        _column(
            "messages",
            pa.string(),
            "the messages before the target and the tools, as JSON; null where the prompt is one text",
            nullable=True,
        ),
        _column("rejected", pa.list_(_ANSWER), "worse answers of the source, encoded like targets", nullable=True),
    ]
)

NEGATIVES = pa.schema(
    [
        _EXAMPLE_ID,
        _SAMPLE_INDEX,
        _column(
            "strategy",
            pa.string(),
            "how it was made: `autoregressive`, `batch`, `meanfield`, `truncation`, `pool` or `prompted`",
        ),
        _column("text", pa.string(), "the continuation without special tokens"),
        _TOKEN_IDS,
        _FINISH_REASON,
        _column(
            "logprob",
            pa.float64(),
            "log-prob under the raw model (before top-k), summed over the tokens, in nats, to float32 precision; null "
            "where none wrote it",
            nullable=True,
        ),
        _SEED,
        _column(
            "generator", pa.string(), "fingerprint of the model, API or file that it is from, if any", nullable=True
        ),
        _column("engine", pa.string(), "provenance, not identity: engine, version, dtype", nullable=True),
    ]
)

CANDIDATE = pa.struct(
    [
        _column("candidate_id", pa.string(), "hash of the prompt's and the candidate's token ids"),
        _column("text", pa.string(), "the continuation without special tokens"),
        _column("token_ids", _IDS, "token ids as trained on"),
        _column("strategy", pa.string(), "`target`, or the name of the negative's source"),
        _column(
            "similarity",
            pa.float32(),
            "score of `rank.by`; of `embedding` the cosine to the target's embedding, −1 to 1",
            nullable=True,
        ),
        _column(
            "truncated",
            pa.bool_(),
            "whether the scorer did not read the text to its end (longer than the embedding model's window)",
            nullable=True,
        ),
        _column("rank", pa.int32(), "position in the preference order; 0 is the target", nullable=True),
    ]
)

GROUPS = pa.schema(
    [
        _EXAMPLE_ID,
        _column("prompt_ids", _IDS, "token ids of the rendered prompt"),
        _column("candidates", pa.list_(CANDIDATE), "the target first, then the negatives that were kept"),
    ]
)

REFERENCE_LOGPROBS = pa.schema(
    [
        _EXAMPLE_ID,
        _column("candidate_id", pa.string(), "hash of the prompt's and the candidate's token ids"),
        _column("logprob", pa.float64(), "log π_ref(candidate | prompt), summed over the tokens, in nats"),
        _column("num_tokens", pa.int32(), "tokens that were summed over"),
    ]
)

GENERATIONS = pa.schema(
    [
        _EXAMPLE_ID,
        _SAMPLE_INDEX,
        _column("text", pa.string(), "output without special tokens"),
        _TOKEN_IDS,
        _FINISH_REASON,
        _SEED,
        _ENGINE,
    ]
)

VERDICTS = pa.schema(
    [
        _EXAMPLE_ID,
        _column("output_a", pa.string(), "hash of the first output's text"),
        _column("output_b", pa.string(), "hash of the second output's text"),
        _column("order", pa.string(), "`ab`: A was shown first; judges that see no order always say `ab`"),
        _column("winner", pa.string(), "`a`, `b` or `tie`"),
        _column("p_a", pa.float64(), "the judge's probability that A is better, where it gives one", nullable=True),
        _column("raw", pa.string(), "the judge's answer or measurements, as JSON"),
    ]
)

RATINGS = pa.schema(
    [
        _EXAMPLE_ID,
        _column("answer", pa.string(), "hash of the rated answer's text"),
        _column(
            "rating",
            pa.float64(),
            "how right the answer is, from 0 to 1; null where the judge's answer is no rating",
            nullable=True,
        ),
        _column("raw", pa.string(), "the judge's answer, as JSON; `unparseable` holds the reason if it is no rating"),
    ]
)

METRICS = pa.schema(
    [
        _column("system", pa.string(), "name in the recipe"),
        _column("decoding", pa.string(), "name of the decoding configuration"),
        _column("metric", pa.string(), "what was measured"),
        _column("value", pa.float64(), "the figure, in the metric's own unit"),
        _column("ci_low", pa.float64(), "lower end of the 95% interval", nullable=True),
        _column("ci_high", pa.float64(), "upper end of the 95% interval", nullable=True),
        _column("n", pa.int64(), "examples it was measured on"),
    ]
)

REJECTED = pa.schema(
    [
        _column("source", pa.string(), "place of the refused row: `file:row`, or `strategy:sample_index`"),
        _column("example_id", pa.string(), "its example, where it has one", nullable=True),
        _column("reason", pa.string(), "the rule that refused it"),
        _column("detail", pa.string(), "the value that broke the rule, cut to 200 characters"),
    ]
)


@dataclass(frozen=True)
class Table:
    """A kind of row artifact."""

    schema: pa.Schema
    key: tuple[str, ...]
    """Columns that identify a row. All start with `example_id`."""


TABLES = {
    "negatives": Table(NEGATIVES, ("example_id", "sample_index")),
    "groups": Table(GROUPS, ("example_id",)),
    "reference-logprobs": Table(REFERENCE_LOGPROBS, ("example_id", "candidate_id")),
    "generations": Table(GENERATIONS, ("example_id", "sample_index")),
    "verdicts": Table(VERDICTS, ("example_id", "output_a", "output_b", "order")),
    "ratings": Table(RATINGS, ("example_id", "answer")),
    "rejected": Table(REJECTED, ("example_id", "source")),
}
