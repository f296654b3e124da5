"""The figures of a comparison: each system's outputs by themselves, against the targets, and against a baseline's."""

import itertools
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cpo_pipe.data.end_tokens import without_end
from cpo_pipe.data.progress import track
from cpo_pipe.data.schemas import METRICS
from cpo_pipe.data.store import Rows
from cpo_pipe.eval.agreement import AGREEMENT, agreements
from cpo_pipe.eval.judges.base import Judge, Judgement, Winner
from cpo_pipe.eval.judges.scores import Encode, ExactJudge, ScoreJudge, SimilarityJudge
from cpo_pipe.eval.length_control import length_controlled
from cpo_pipe.eval.mauve import MIN_TEXTS, mauve
from cpo_pipe.eval.power import examples_needed
from cpo_pipe.eval.statistics import Bootstrap, Estimate, holm, share, sign_flip_p
from cpo_pipe.eval.text_metrics import chrf, distinct_n, ends_in_loop, rep_n, self_bleu

ANY_DECODING = "-"
"""Stands for the decoding in figures that depend on none."""

OUTCOME = {"a": 1.0, "tie": 0.5, "b": 0.0}

NOTICEABLE = 0.05
"""The difference of win rates for which the examples needed are told."""

VALUES = pa.schema(
    [("example_id", pa.string()), ("system", pa.string()), ("decoding", pa.string()), ("metric", pa.string()),
     ("value", pa.float64())]
)  # fmt: skip

COMPARISONS = pa.schema(
    [
        ("metric", pa.string()),
        ("decoding", pa.string()),
        ("system_a", pa.string()),
        ("system_b", pa.string()),
        ("difference", pa.float64()),  # of the means over the same examples, a's less b's
        ("ci_low", pa.float64()),  # 95% bootstrap interval, paired
        ("ci_high", pa.float64()),
        ("p", pa.float64()),  # two-sided, by exchanging a and b on each example
        ("p_holm", pa.float64()),  # adjusted for all rows of the metric
        ("n", pa.int64()),  # examples
        ("n_needed", pa.int64()),  # examples on which a true difference of NOTICEABLE is found four times in five
    ]
)

VERDICTS = pa.schema(
    [
        ("example_id", pa.string()),
        ("judge", pa.string()),
        ("system", pa.string()),
        ("opponent", pa.string()),
        ("decoding", pa.string()),
        ("winner", pa.string()),  # `a` (the system), `b` (the opponent) or `tie`, of all orders together
        # What the judge said when asked, by order (`ab`: the system was shown first); empty for equal outputs.
        ("orders", pa.list_(pa.struct([("order", pa.string()), ("winner", pa.string()), ("p_a", pa.float64()),
                                       ("raw", pa.string())]))),
    ]
)  # fmt: skip


def comparison_metrics(judge: str, against: str | None = None) -> tuple[str, str, str, str]:
    """Names of a judge's metrics: shares won, tied and lost, and the win rate, in which a tie counts half.

    `against` is whom the comparison is with, where that is not the baseline.
    """
    whom = f" against {against}" if against is not None else ""
    return f"{judge} win{whom}", f"{judge} tie{whom}", f"{judge} loss{whom}", f"{judge} win rate{whom}"


def length_controlled_metric(judge: str) -> str:
    """Name of a judge's win rate at equal length."""
    return f"{judge} length-controlled win rate"


def order_metrics(judge: str) -> tuple[str, str, str]:
    """Names of what a judge that is shown outputs in an order owes to the order, and of what it left unsaid."""
    return f"{judge} position bias", f"{judge} flip rate", f"{judge} unparseable"


def embedding_metrics(judges: Iterable[str], against: Iterable[str] = (), mauve: bool = True) -> frozenset[str]:
    """Names of the metrics that are measured with the embedding model.

    Given the names of the judges that use it, whom systems are compared with beside the baseline, and whether MAUVE
    uses it.
    """
    found = {SimilarityJudge.metric, *(("MAUVE", "MAUVE sd") if mauve else ())}
    for judge in judges:
        found |= {name for whom in (None, *against) for name in comparison_metrics(judge, whom)}
        found.add(length_controlled_metric(judge))
    return frozenset(found)


@dataclass(frozen=True)
class Outputs:
    """Texts of one system and decoding (or the targets), in the selection's order."""

    texts: list[str]
    """In NFC: texts that differ only in their Unicode form count as equal in every metric, judge and tie."""
    token_ids: list[list[int]]
    """Without the token that ended the text: it is no part of what is repeated or counted."""


def read_outputs(generations: Rows, example_ids: Sequence[str]) -> Outputs:
    """The first sample of each example; one that an API refused is empty."""
    first = read_samples(generations, example_ids, 1)
    return Outputs([(of.texts or [""])[0] for of in first], [(of.token_ids or [[]])[0] for of in first])


def read_samples(generations: Rows, example_ids: Sequence[str], n: int) -> list[Outputs]:
    """The first n samples of each example, without those that an API refused."""
    table = generations.read(example_ids, ["example_id", "sample_index", "text", "token_ids", "finish_reason"])
    table = table.filter(pc.less(table["sample_index"], n))
    ended = pc.equal(table["finish_reason"], "stop").to_pylist()
    columns = (table["example_id"].to_pylist(), table["text"].to_pylist(),
               list(map(without_end, table["token_ids"].to_pylist(), ended)))  # fmt: skip
    found: dict[str, Outputs] = {example_id: Outputs([], []) for example_id in example_ids}
    for example_id, text, token_ids in zip(*columns, strict=True):
        found[example_id].texts.append(unicodedata.normalize("NFC", text))
        found[example_id].token_ids.append(token_ids)
    return list(found.values())


def read_targets(selection: pa.Table) -> Outputs:
    """The ground truth, as if a system had written it."""
    ids = map(without_end, selection["target_ids"].to_pylist(), selection["ends"].to_pylist())
    return Outputs([unicodedata.normalize("NFC", text) for text in selection["target"].to_pylist()], list(ids))


@dataclass(frozen=True)
class _Contest:
    """How a system fared against the baseline, example by example."""

    outcomes: NDArray[np.float64]
    longer: NDArray[np.float64]
    """Characters of the system's output less the baseline's."""


class Measurement:
    """Collects figures over one selection of examples, and what they are means of."""

    def __init__(self, example_ids: list[str], targets: Outputs, bootstrap: Bootstrap):
        self._example_ids = example_ids
        self._targets = targets
        self._bootstrap = bootstrap
        self._figures: list[dict[str, Any]] = []
        self._values: list[pa.Table] = []
        self._comparisons: list[dict[str, Any]] = []
        self._verdicts: list[pa.Table] = []
        self._agreements: list[dict[str, Any]] = []
        self._contests: dict[tuple[str, str], dict[str, _Contest]] = {}
        """By judge's name and decoding, then by system."""

    def figures(self) -> pa.Table:
        """What was measured (METRICS schema), in the order it was."""
        return pa.Table.from_pylist(self._figures, schema=METRICS)

    def values(self) -> pa.Table:
        """The figures per example that the means were taken of."""
        return pa.concat_tables([VALUES.empty_table(), *self._values])

    def comparisons(self) -> pa.Table:
        """The systems pair by pair (COMPARISONS schema)."""
        return pa.Table.from_pylist(self._comparisons, schema=COMPARISONS)

    def verdicts(self) -> pa.Table:
        """How each output was judged (VERDICTS schema)."""
        return pa.concat_tables([VERDICTS.empty_table(), *self._verdicts])

    def agreements(self) -> pa.Table:
        """The judges, and the labels of people, pair by pair (AGREEMENT schema)."""
        return pa.Table.from_pylist(self._agreements, schema=AGREEMENT)

    def keep_judgements(
        self, judge: Judge, system: str, opponent: str, decoding: str, judgements: Sequence[Judgement]
    ) -> None:
        """Keep what a judge makes of the system's outputs, a of each judgement, against the opponent's."""
        rows = []
        for example_id, judgement in zip(self._example_ids, judgements, strict=True):
            orders = [
                {"order": order, "winner": said.winner, "p_a": said.p_a, "raw": json.dumps(said.raw)}
                for order, said in judgement.by_order.items()
            ]
            rows.append({"example_id": example_id, "judge": judge.name, "system": system, "opponent": opponent,
                         "decoding": decoding, "winner": judgement.winner, "orders": orders})  # fmt: skip
        self._verdicts.append(pa.Table.from_pylist(rows, schema=VERDICTS))

    def measure_text(self, system: str, decoding: str, outputs: Outputs) -> None:
        """Repetition, variety and length."""
        self._add_mean(system, decoding, "rep-4", [rep_n(ids, 4) for ids in outputs.token_ids])
        self._add_share(system, decoding, "loops", [ends_in_loop(ids) for ids in outputs.token_ids])
        for n in (1, 2, 3):
            self._add_plain(system, decoding, f"distinct-{n}", distinct_n(outputs.token_ids, n))
        self._add_mean(system, decoding, "length", [len(ids) for ids in outputs.token_ids])

    def measure_diversity(self, system: str, decoding: str, samples: Sequence[Outputs]) -> None:
        """How alike the samples of a prompt are, over the prompts that have two at least."""
        several = [of for of in samples if len(of.texts) > 1]
        if not several:
            return
        blunt = []
        with track(f"self-BLEU of {system}, {decoding}", len(several)) as meter:
            for of in several:
                blunt.append(self_bleu(of.texts))
                meter.advance()
        self._add(system, decoding, "self-BLEU", self._bootstrap.mean(blunt))
        distinct = [distinct_n(of.token_ids, 2) for of in several]
        self._add(system, decoding, "distinct-2 of samples", self._bootstrap.mean(distinct))

    def measure_overlap(self, system: str, decoding: str, outputs: Outputs) -> None:
        """Characters shared with the target."""
        self._add_mean(system, decoding, "chrF", chrf(outputs.texts, self._targets.texts).tolist())

    def measure_nll(self, system: str, scored: Sequence[tuple[float, int]]) -> None:
        """The targets' negative log-likelihood per token, in nats: all nats by all tokens; and its exponential."""
        nats, tokens = np.array([-logprob for logprob, _ in scored]), np.array([count for _, count in scored])
        nll = self._bootstrap.ratio(nats, tokens)
        self._add(system, ANY_DECODING, "target NLL", nll)
        self._add(system, ANY_DECODING, "target perplexity", nll.exp())
        self._keep(system, ANY_DECODING, "target NLL", (nats / tokens).tolist())

    def measure_mauve(self, system: str, decoding: str, outputs: Outputs, encode: Encode, seeds: Sequence[int]) -> None:
        """Distance of the outputs as a set from the targets as a set; below MIN_TEXTS examples it says nothing."""
        assert len(self._example_ids) >= MIN_TEXTS
        score = mauve(encode(self._targets.texts), encode(outputs.texts), seeds)
        self._add_plain(system, decoding, "MAUVE", score.mean)
        if score.sd is not None:
            self._add_plain(system, decoding, "MAUVE sd", score.sd)

    def measure_score(self, judge: ScoreJudge, system: str, decoding: str, scores: Sequence[float]) -> None:
        """What the judge goes by, for itself."""
        add = self._add_share if isinstance(judge, ExactJudge) else self._add_mean
        add(system, decoding, judge.score_name, scores)

    def measure_wins(
        self,
        judge: Judge,
        judgements: Sequence[Judgement],
        system: str,
        decoding: str,
        outputs: Outputs,
        baseline: Outputs,
        against: str | None = None,
    ) -> None:
        """How often the judge prefers the system's output, a of each judgement, to the baseline's.

        With `against` the other side is that system instead, and the figures are for themselves.
        """
        outcomes = [OUTCOME[judgement.winner] for judgement in judgements]
        shares = self._bootstrap.compare(outcomes)
        names = comparison_metrics(judge.name, against)
        for name, estimate in zip(names, (shares.win, shares.tie, shares.loss, shares.rate), strict=True):
            self._add(system, decoding, name, estimate)
        self._keep(system, decoding, names[-1], outcomes)
        if against is not None:
            return
        longer = [len(a) - len(b) for a, b in zip(outputs.texts, baseline.texts, strict=True)]
        contests = self._contests.setdefault((judge.name, decoding), {})
        contests[system] = _Contest(np.array(outcomes, np.float64), np.array(longer, np.float64))

    def measure_order(self, judge: Judge, system: str, decoding: str, judgements: Sequence[Judgement]) -> None:
        """What a judge owes to the order in which outputs are shown, over the examples that say something on it.

        Position bias: of the verdicts that name a winner, the share for what was shown first; 0.5 is none. Flip rate:
        the share of the pairs whose verdict changes with the order. Unparseable: the share of answers that are none.
        """
        bias, flips, unparseable = order_metrics(judge.name)
        named = [judgement.for_first for judgement in judgements if judgement.for_first[1]]
        if named:
            first, winners = zip(*named, strict=True)
            self._add(system, decoding, bias, self._bootstrap.ratio(first, winners))
        if flipped := [judgement.flipped for judgement in judgements if judgement.flipped is not None]:
            self._add(system, decoding, flips, share(flipped))
        if unread := [judgement.unparseable for judgement in judgements if judgement.unparseable is not None]:
            self._add(system, decoding, unparseable, self._bootstrap.mean(unread))

    def measure_agreement(self, verdicts: Mapping[str, Sequence[Winner | None]], examples: Sequence[int]) -> None:
        """How far judges, and labels of people, agree; as in `agreements`."""
        self._agreements += agreements(verdicts, examples, self._bootstrap)

    def measure_differences(self, baseline: str, fingerprints: Mapping[str, str]) -> None:
        """After all wins: each win rate at equal length, and the difference of every two systems' win rates.

        Two systems are compared by how each fares against the baseline on the same examples; the baseline ties with
        itself. Of systems with one fingerprint (an ensemble's end is its part) only one is compared. Holm's adjustment
        is over all pairs and decodings of a judge, as they stand in one table.

        Args:
            baseline: the system that the others were judged against.
            fingerprints: what each system is.
        """
        first = {fingerprint: system for system, fingerprint in reversed([*fingerprints.items()])}
        if baseline in fingerprints:
            first[fingerprints[baseline]] = baseline
        for (judge, decoding), contests in self._contests.items():
            for system, contest in contests.items():
                rate = length_controlled(contest.outcomes, contest.longer, self._bootstrap)
                if rate is not None:
                    self._add(system, decoding, length_controlled_metric(judge), rate)
        for judge in dict.fromkeys(judge for judge, _ in self._contests):
            pairs = [
                pair
                for (name, decoding), contests in self._contests.items()
                if name == judge
                for pair in self._compared(
                    comparison_metrics(judge)[-1],
                    decoding,
                    {system: contest for system, contest in contests.items() if first[fingerprints[system]] == system},
                    baseline,
                )
            ]
            adjusted = holm([pair["p"] for pair in pairs])
            self._comparisons += [pair | {"p_holm": p} for pair, p in zip(pairs, adjusted, strict=True)]

    def _compared(
        self, metric: str, decoding: str, contests: Mapping[str, _Contest], baseline: str
    ) -> list[dict[str, Any]]:
        """Every two systems; the baseline stands last, so that a positive difference is a system's gain on it."""
        outcomes = {name: contest.outcomes for name, contest in contests.items()}
        outcomes[baseline] = np.full(len(self._example_ids), OUTCOME["tie"])
        rows = []
        for (a, of_a), (b, of_b) in itertools.combinations(outcomes.items(), 2):
            differences = of_a - of_b
            estimate = self._bootstrap.difference(of_a, of_b)
            rows.append({
                "metric": metric, "decoding": decoding, "system_a": a, "system_b": b, "difference": estimate.value,
                "ci_low": estimate.low, "ci_high": estimate.high, "p": sign_flip_p(differences), "n": estimate.n,
                "n_needed": examples_needed(NOTICEABLE, float(differences.std())),
            })  # fmt: skip
        return rows

    def _add_share(self, system: str, decoding: str, metric: str, flags: Sequence[float]) -> None:
        self._add(system, decoding, metric, share(flags))
        self._keep(system, decoding, metric, flags)

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
