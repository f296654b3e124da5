"""What a judge is, and how its verdicts are kept: by example, outputs and order, so that nothing is asked twice."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pyarrow as pa

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows

Winner = Literal["a", "b", "tie"]
Key = tuple[str, str, str, str]
"""Row key of a verdict: example id, hashes of both outputs, order."""

AB, BA = "ab", "ba"
"""The orders of a pair: output A is shown first, or output B."""

NOISE = 1e-6
"""Cosines, log-probs and probabilities nearer to each other than this are a tie: so much depends on what a text was
batched with."""

OTHER: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
"""A verdict about the pair with its outputs changed over."""


@dataclass(frozen=True)
class Case:
    """What outputs are written for."""

    example_id: str
    prompt: str
    """As the source has it."""
    rendered: str
    """As the systems were given it."""
    target: str


@dataclass(frozen=True)
class Pair:
    """Two outputs for one prompt; a judge that sees an order is shown output A first."""

    case: Case
    output_a: str
    output_b: str

    def swapped(self) -> "Pair":
        """The same with the outputs changed over."""
        return Pair(self.case, self.output_b, self.output_a)


@dataclass(frozen=True)
class Verdict:
    """One judgement."""

    winner: Winner
    p_a: float | None
    """The judge's probability that A is better, where it gives one."""
    raw: Mapping[str, Any]
    """What was said or measured, plain JSON values; with `unparseable`, the reason, where that is no verdict."""

    @property
    def parsed(self) -> bool:
        """Whether the judge gave a verdict that could be read; one that could not counts as a tie."""
        return "unparseable" not in self.raw

    def swapped(self) -> "Verdict":
        """The same about the pair with its outputs changed over; `raw` stays as it was."""
        return Verdict(OTHER[self.winner], None if self.p_a is None else 1 - self.p_a, self.raw)


def unparseable(reason: str, **said: Any) -> Verdict:
    """What counts as a tie because it is no verdict; it is kept as an answer like others."""
    return Verdict("tie", None, {"unparseable": reason, **said})


@dataclass(frozen=True)
class Judgement:
    """What a judge makes of a pair, whatever the order.

    As in MT-bench (Zheng et al. 2023, §3.4) a win is one that both orders agree on; all else is a tie. Where a judge
    gives probabilities, their mean over both orders decides.
    """

    by_order: Mapping[str, Verdict]
    """By AB and BA; empty for equal outputs, a tie that nobody was asked about."""

    @property
    def p_a(self) -> float | None:
        """The judge's probability that A is better, mean of the orders, where it gives one."""
        each = [verdict.p_a for verdict in self.by_order.values() if verdict.p_a is not None]
        return sum(each) / len(each) if each and len(each) == len(self.by_order) else None

    @property
    def winner(self) -> Winner:
        """The better output."""
        if self.p_a is not None:
            return higher(self.p_a, 0.5, NOISE)
        winners = {verdict.winner for verdict in self.by_order.values()}
        return winners.pop() if len(winners) == 1 else "tie"

    def swapped(self) -> "Judgement":
        """The same about the pair with its outputs changed over."""
        return Judgement({order[::-1]: verdict.swapped() for order, verdict in self.by_order.items()})

    @property
    def for_first(self) -> tuple[int, int]:
        """Verdicts for the output that was shown first, and all that name a winner."""
        first = [order[0] == verdict.winner for order, verdict in self.by_order.items() if verdict.winner != "tie"]
        return sum(first), len(first)

    @property
    def flipped(self) -> bool | None:
        """Whether the verdict changes with the order; None where not both orders gave one."""
        verdicts = [verdict.winner for verdict in self.by_order.values() if verdict.parsed]
        return len(set(verdicts)) > 1 if len(verdicts) == 2 else None

    @property
    def unparseable(self) -> float | None:
        """Share of the answers that could not be read; None where nobody was asked."""
        verdicts = self.by_order.values()
        return sum(not verdict.parsed for verdict in verdicts) / len(verdicts) if verdicts else None


class Judge(Protocol):
    """Something that compares two outputs for the same prompt."""

    name: str
    """As the recipe calls it; names its metrics and is no identity."""
    sees_order: bool
    """Whether it is shown one output before the other."""
    orders: Sequence[str]
    """Those of AB and BA that it is asked in; AB where it sees none."""

    def spec(self) -> Spec:
        """What decides its verdicts."""
        ...

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """Place and verdict of each pair, as they are ready; what comes together is recorded at once.

        A pair that got no answer is left out.
        """
        ...


def judged(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> list[Judgement]:
    """What the judge makes of `pairs`, in order; it is asked for what `rows` lacks."""
    make_verdicts(judge, pairs, rows)
    return read_judgements(judge, pairs, rows)


def make_verdicts(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> None:
    """Have all judged that is missing; what was answered is kept, however this ends."""
    if not unjudged(judge, pairs, rows):
        return
    with rows.lock(), rows.writer() as writer:
        todo = unjudged(judge, pairs, rows)  # again: another process may have made them while we waited
        keys = list(todo)
        with track(f"judge {judge.name}", len(todo)) as meter:
            for came in judge.judge(list(todo.values())):
                writer.add([_row(keys[place], verdict) for place, verdict in came])
                writer.flush()
                meter.advance(len(came))


def unjudged(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> dict[Key, Pair]:
    """What is still to be asked, by row key: each pair as it is shown."""
    asked: dict[Key, Pair] = {}
    for pair in pairs:
        kept, key = _kept(judge, pair)
        if pair.output_a != pair.output_b:
            asked |= {(*key, order): kept if order == AB else kept.swapped() for order in judge.orders}
    columns = zip(*asked, strict=True) if asked else ([], [], [], [])
    wanted = pa.table(dict(zip(rows.key, (pa.array(column, pa.string()) for column in columns), strict=True)))
    return {key: asked[key] for key in _keys(rows.missing(wanted))}


def read_judgements(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> list[Judgement]:
    """What the judge made of `pairs`, in order.

    Raises:
        RunError: some are not judged yet.
    """
    if missing := len(unjudged(judge, pairs, rows)):
        raise RunError(f"judge {judge.name}: {missing:,} verdicts are missing; run the same command again")
    table = rows.read(list(dict.fromkeys(pair.case.example_id for pair in pairs)))
    found = dict(zip(_keys(table), table.select(["winner", "p_a", "raw"]).to_pylist(), strict=True))
    judgements = []
    for pair in pairs:
        kept, key = _kept(judge, pair)
        if pair.output_a == pair.output_b:
            judgements.append(Judgement({}))
            continue
        judgement = Judgement({order: _verdict(order, found[(*key, order)]) for order in judge.orders})
        judgements.append(judgement if kept is pair else judgement.swapped())
    return judgements


def higher(a: float, b: float, noise: float) -> Winner:
    """Which of two scores is the higher one."""
    if abs(a - b) <= noise:
        return "tie"
    return "a" if a > b else "b"


def _kept(judge: Judge, pair: Pair) -> tuple[Pair, tuple[str, str, str]]:
    """The pair as its verdict is kept, with its row key but for the order.

    For a judge that sees an order, x against y and y against x are kept as one. With a single order, what is shown
    first is then decided by the hashes of the outputs, as good as by chance.
    """
    hashes = digest(pair.output_a), digest(pair.output_b)
    if judge.sees_order and hashes[0] > hashes[1]:
        return pair.swapped(), (pair.case.example_id, *reversed(hashes))  # type: ignore[return-value]
    return pair, (pair.case.example_id, *hashes)


def _row(key: Key, shown: Verdict) -> dict[str, Any]:
    """A row (VERDICTS schema) of a verdict about the pair as it was shown."""
    example_id, output_a, output_b, order = key
    verdict = shown if order == AB else shown.swapped()
    return {"example_id": example_id, "output_a": output_a, "output_b": output_b, "order": order,
            "winner": verdict.winner, "p_a": verdict.p_a, "raw": json.dumps(verdict.raw)}  # fmt: skip


def _verdict(order: str, row: Mapping[str, Any]) -> Verdict:
    return Verdict(row["winner"], row["p_a"], json.loads(row["raw"]))


def _keys(table: pa.Table) -> list[Key]:
    columns = [table[name].to_pylist() for name in ("example_id", "output_a", "output_b", "order")]
    return list(zip(*columns, strict=True))
