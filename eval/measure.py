"""The figures of a comparison: each system's outputs by themselves, against the targets, and against a baseline's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpo_pipe.data.schemas import METRICS
from cpo_pipe.data.store import Rows
from cpo_pipe.eval.judges import Encode, ExactJudge, Judge, Pair, SimilarityJudge, judged
from cpo_pipe.eval.mauve import MIN_TEXTS, mauve
from cpo_pipe.eval.statistics import Bootstrap, Estimate
from cpo_pipe.eval.text_metrics import chrf, distinct_n, rep_n

ANY_DECODING = "-"
"""Stands for the decoding in figures that depend on none."""

OUTCOME = {"a": 1.0, "tie": 0.5, "b": 0.0}

VALUES = pa.schema(
    [("example_id", pa.string()), ("system", pa.string()), ("decoding", pa.string()), ("metric", pa.string()),
     ("value", pa.float64())]
)  # fmt: skip


def comparison_metrics(judge: str) -> tuple[str, str, str, str]:
    """Names of a judge's metrics: shares won, tied and lost, and the win rate, in which a tie counts half."""
    return f"{judge} win", f"{judge} tie", f"{judge} loss", f"{judge} win rate"


def embedding_metrics() -> frozenset[str]:
    """Names of the metrics that are measured with the embedding model."""
    return frozenset({"MAUVE", "MAUVE sd", SimilarityJudge.score_name, *comparison_metrics(SimilarityJudge.name)})


@dataclass(frozen=True)
class Outputs:
    """Texts of one system and decoding (or the targets), in the selection's order."""

    texts: list[str]
    token_ids: list[list[int]]
    """Without the token that ended the text: it is no part of what is repeated or counted."""


def read_outputs(generations: Rows, example_ids: Sequence[str]) -> Outputs:
    """The first sample of each example."""
    table = generations.read(example_ids, ["sample_index", "text", "token_ids", "finish_reason"])
    table = table.filter(pc.equal(table["sample_index"], 0))
    ended = pc.equal(table["finish_reason"], "stop").to_pylist()
    return Outputs(table["text"].to_pylist(), _without_end(table["token_ids"].to_pylist(), ended))


def read_targets(selection: pa.Table) -> Outputs:
    """The ground truth, as if a system had written it."""
    ids = _without_end(selection["target_ids"].to_pylist(), selection["ends"].to_pylist())
    return Outputs(selection["target"].to_pylist(), ids)


def _without_end(token_ids: Sequence[list[int]], ended: Sequence[bool]) -> list[list[int]]:
    return [ids[:-1] if end else ids for ids, end in zip(token_ids, ended, strict=True)]


class Measurement:
    """Collects figures over one selection of examples, and what they are means of."""

    def __init__(self, example_ids: list[str], targets: Outputs, bootstrap: Bootstrap):
        self._example_ids = example_ids
        self._targets = targets
        self._bootstrap = bootstrap
        self._figures: list[dict[str, Any]] = []
        self._values: list[pa.Table] = []

    def figures(self) -> pa.Table:
        """What was measured (METRICS schema), in the order it was."""
        return pa.Table.from_pylist(self._figures, schema=METRICS)

    def values(self) -> pa.Table:
        """The figures per example that the means were taken of."""
        return pa.concat_tables([VALUES.empty_table(), *self._values])

    def measure_text(self, system: str, decoding: str, outputs: Outputs) -> None:
        """Repetition, variety and length."""
        self._add_mean(system, decoding, "rep-4", [rep_n(ids, 4) for ids in outputs.token_ids])
        self._add_plain(system, decoding, "distinct-2", distinct_n(outputs.token_ids, 2))
        self._add_mean(system, decoding, "length", [len(ids) for ids in outputs.token_ids])

    def measure_overlap(self, system: str, decoding: str, outputs: Outputs) -> None:
        """Characters shared with the target."""
        self._add_mean(system, decoding, "chrF", chrf(outputs.texts, self._targets.texts).tolist())

    def measure_nll(self, system: str, scored: Sequence[tuple[float, int]]) -> None:
        """The targets' negative log-likelihood per token, in nats: all nats by all tokens."""
        nats, tokens = np.array([-logprob for logprob, _ in scored]), np.array([count for _, count in scored])
        self._add(system, ANY_DECODING, "target NLL", self._bootstrap.ratio(nats, tokens))
        self._keep(system, ANY_DECODING, "target NLL", (nats / tokens).tolist())

    def measure_mauve(self, system: str, decoding: str, outputs: Outputs, encode: Encode, seeds: Sequence[int]) -> None:
        """Distance of the outputs as a set from the targets as a set; below MIN_TEXTS examples it says nothing."""
        assert len(self._example_ids) >= MIN_TEXTS
        score = mauve(encode(self._targets.texts), encode(outputs.texts), seeds)
        self._add_plain(system, decoding, "MAUVE", score.mean)
        if score.sd is not None:
            self._add_plain(system, decoding, "MAUVE sd", score.sd)

    def measure_score(self, judge: ExactJudge | SimilarityJudge, system: str, decoding: str, outputs: Outputs) -> None:
        """What the judge goes by, for itself."""
        self._add_mean(system, decoding, judge.score_name, judge.scores(outputs.texts, self._targets.texts))

    def measure_wins(
        self, judge: Judge, verdicts: Rows, system: str, decoding: str, outputs: Outputs, baseline: Outputs
    ) -> None:
        """How often the judge prefers the system's output to the baseline's."""
        columns = (self._example_ids, self._targets.texts, outputs.texts, baseline.texts)
        pairs = [Pair(*fields) for fields in zip(*columns, strict=True)]
        outcomes = [OUTCOME[verdict.winner] for verdict in judged(judge, pairs, verdicts)]
        shares = self._bootstrap.compare(outcomes)
        names = comparison_metrics(judge.name)
        for name, share in zip(names, (shares.win, shares.tie, shares.loss, shares.rate), strict=True):
            self._add(system, decoding, name, share)
        self._keep(system, decoding, names[-1], outcomes)

    def _add_mean(self, system: str, decoding: str, metric: str, values: Sequence[float]) -> None:
        self._add(system, decoding, metric, self._bootstrap.mean(values))
        self._keep(system, decoding, metric, values)

    def _add_plain(self, system: str, decoding: str, metric: str, value: float) -> None:
        """A figure of the outputs as a set, which has no interval."""
        self._add(system, decoding, metric, Estimate(value, None, None, len(self._example_ids)))

    def _add(self, system: str, decoding: str, metric: str, estimate: Estimate) -> None:
        self._figures.append({"system": system, "decoding": decoding, "metric": metric, "value": estimate.value,
                              "ci_low": estimate.low, "ci_high": estimate.high, "n": estimate.n})  # fmt: skip

    def _keep(self, system: str, decoding: str, metric: str, values: Sequence[float]) -> None:
        n = len(self._example_ids)
        columns = [self._example_ids, [system] * n, [decoding] * n, [metric] * n, [float(value) for value in values]]
        self._values.append(pa.table(dict(zip(VALUES.names, columns, strict=True)), schema=VALUES))
