"""Verdicts: stored by example, outputs and order, so that no judge is asked the same question twice."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import digest
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.store.locks import make_missing
from cpo_pipe.eval.annotations import Annotations
from cpo_pipe.eval.generate import Outputs, read_targets
from cpo_pipe.eval.judges.base import (
    AB,
    ApiJudge,
    Case,
    Judge,
    Judgement,
    Pair,
    ScoreJudge,
    Verdict,
    Winner,
)
from cpo_pipe.eval.statistics.agreement import HUMANS

Key = tuple[str, str, str, str]
"""Row key of a verdict: example id, hashes of both outputs, order."""

Comparison = tuple[str, str, str]
"""A system, a decoding and the opponent whose outputs its own are judged against."""

VERDICTS = pa.schema(
    [
        ("example_id", pa.string()),
        ("judge", pa.string()),
        ("system", pa.string()),
        ("opponent", pa.string()),
        ("decoding", pa.string()),
        ("winner", pa.string()),  # `a` (the system), `b` (the opponent) or `tie`, of all orders together
        # The judge's answer in each order (`ab`: the system was shown first); empty for equal outputs.
        ("orders", pa.list_(pa.struct([("order", pa.string()), ("winner", pa.string()), ("p_a", pa.float64()),
                                       ("raw", pa.string())]))),
    ]
)  # fmt: skip


def read_cases(selection: pa.Table) -> list[Case]:
    """Return the prompts and targets of the examples."""
    columns = [selection[name].to_pylist() for name in ("example_id", "prompt", "rendered")]
    texts, messages = read_targets(selection).texts, selection["messages"].to_pylist()
    return [Case(*fields) for fields in zip(*columns, texts, messages, strict=True)]


def judge_outputs(
    judges: Sequence[Judge],
    comparisons: Sequence[Comparison],
    cases: Sequence[Case],
    outputs: Mapping[tuple[str, str], Outputs],
    store: Store,
) -> dict[str, dict[Comparison, list[Judgement]]]:
    """Return each judge's judgements of each comparison, in the order of the cases.

    All judges are asked before a missing answer is an error: what one API leaves unanswered does not stop the others.

    Args:
        judges: the judges.
        comparisons: what to compare.
        cases: the prompts.
        outputs: by system and decoding, those of opponents included.
        store: where verdicts are stored.

    Raises:
        RunError: an API did not answer every request; its answers are stored. Or a score is not finite.
    """
    pairs = {
        (system, decoding, opponent): [
            Pair(*fields)
            for fields in zip(cases, outputs[system, decoding].texts, outputs[opponent, decoding].texts, strict=True)
        ]
        for system, decoding, opponent in comparisons
    }
    rows = {judge.name: store.rows("verdicts", judge.spec()) for judge in judges}
    for judge in judges:
        make_verdicts(judge, list(chain.from_iterable(pairs.values())), rows[judge.name])
    for judge in judges:
        if isinstance(judge, ApiJudge):
            judge.api.check_answered()
    return {
        judge.name: {comparison: read_judgements(judge, some, rows[judge.name]) for comparison, some in pairs.items()}
        for judge in judges
    }


def score_outputs(
    judge: ScoreJudge, cases: Sequence[Case], outputs: Mapping[tuple[str, str], Outputs]
) -> dict[tuple[str, str], list[float]]:
    """Return a judge's scores by system and decoding, computed in one call so that a model is loaded once.

    Raises:
        RunError: a score is not finite.
    """
    texts, n = [text for written in outputs.values() for text in written.texts], len(cases)
    scores = judge.checked_scores([*cases] * len(outputs), texts)
    return {key: scores[place * n : (place + 1) * n] for place, key in enumerate(outputs)}


def verdicts_table(judgements: Mapping[str, Mapping[Comparison, Sequence[Judgement]]], ids: Sequence[str]) -> pa.Table:
    """Return all judgements (VERDICTS schema), by system and decoding, then by judge, then by opponent."""
    tables = [VERDICTS.empty_table()]
    comparisons = [*next(iter(judgements.values()), {})]
    parts = dict.fromkeys((system, decoding) for system, decoding, _ in comparisons)
    for judge, comparison in (
        (judge, one) for part in parts for judge in judgements for one in comparisons if one[:2] == part
    ):
        system, decoding, opponent = comparison
        rows = []
        for example_id, judgement in zip(ids, judgements[judge][comparison], strict=True):
            orders = [
                {"order": order, "winner": verdict.winner, "p_a": verdict.p_a, "raw": json.dumps(verdict.raw)}
                for order, verdict in judgement.by_order.items()
            ]
            rows.append({"example_id": example_id, "judge": judge, "system": system, "opponent": opponent,
                         "decoding": decoding, "winner": judgement.winner, "orders": orders})  # fmt: skip
        tables.append(pa.Table.from_pylist(rows, schema=VERDICTS))
    return pa.concat_tables(tables)


def winners_by_rater(
    judgements: Mapping[str, Mapping[Comparison, Sequence[Judgement]]],
    cases: Sequence[Case],
    outputs: Mapping[tuple[str, str], Outputs],
    annotations: Annotations | None,
) -> tuple[dict[str, list[Winner | None]], list[int]]:
    """Return the winners of each distinct pair of unequal outputs, by judge and by humans, and the pairs' cases."""
    winners: dict[str, list[Winner | None]] = {judge: [] for judge in judgements}
    if annotations is not None:
        winners[HUMANS] = []
    places: list[int] = []
    seen = set[tuple[int, str, str]]()
    for system, decoding, opponent in next(iter(judgements.values()), {}):
        texts = zip(outputs[system, decoding].texts, outputs[opponent, decoding].texts, strict=True)
        for place, (case, (a, b)) in enumerate(zip(cases, texts, strict=True)):
            if a == b or (place, a, b) in seen:
                continue
            seen |= {(place, a, b), (place, b, a)}
            places.append(place)
            for judge, found in judgements.items():
                winners[judge].append(found[system, decoding, opponent][place].winner)
            if annotations is not None:
                winners[HUMANS].append(annotations.winner(Pair(case, a, b)))
    return winners, places


# ── stored verdicts of one judge ─────────────────────────────────────────────────────────────────────────────────


def make_verdicts(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> None:
    """Ask for the missing verdicts. Answers are stored as they come, even if the judge fails later."""

    def make(missing: dict[Key, Pair]) -> None:
        keys = list(missing)
        with rows.writer() as writer, track(f"judge {judge.name}", len(missing), "pairs") as meter:
            for verdicts in judge.judge(list(missing.values())):
                writer.add([_row(keys[place], verdict) for place, verdict in verdicts])
                writer.flush()
                meter.advance(len(verdicts))

    make_missing(lambda: unjudged(judge, pairs, rows), make, rows)


def unjudged(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> dict[Key, Pair]:
    """Return the missing verdicts: each pair as the judge is shown it, by row key."""
    shown: dict[Key, Pair] = {}
    for pair in pairs:
        stored, key = _stored(judge, pair)
        if pair.output_a != pair.output_b:
            shown |= {(*key, order): stored if order == AB else stored.swapped() for order in judge.orders}
    columns = zip(*shown, strict=True) if shown else ([], [], [], [])
    keys = pa.table(dict(zip(rows.key, (pa.array(column, pa.string()) for column in columns), strict=True)))
    return {key: shown[key] for key in _keys(rows.missing(keys))}


def read_judgements(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> list[Judgement]:
    """Return the stored judgements of `pairs`, in order.

    Raises:
        RunError: verdicts are missing.
    """
    if missing := len(unjudged(judge, pairs, rows)):
        raise RunError(f"judge {judge.name}: {missing:,} verdicts are missing; run the same command again")
    table = rows.read(list(dict.fromkeys(pair.case.example_id for pair in pairs)))
    found = dict(zip(_keys(table), table.select(["winner", "p_a", "raw"]).to_pylist(), strict=True))
    judgements = []
    for pair in pairs:
        stored, key = _stored(judge, pair)
        if pair.output_a == pair.output_b:
            judgements.append(Judgement({}))
            continue
        verdicts = {order: found[(*key, order)] for order in judge.orders}
        judgement = Judgement({
            order: Verdict(row["winner"], row["p_a"], json.loads(row["raw"])) for order, row in verdicts.items()
        })  # fmt: skip
        judgements.append(judgement if stored is pair else judgement.swapped())
    return judgements


def _stored(judge: Judge, pair: Pair) -> tuple[Pair, tuple[str, str, str]]:
    """Return the pair as its verdict is stored, with its row key without the order.

    For a judge that sees an order, x against y and y against x are stored as one. With a single order, the hashes of
    the outputs then decide which is shown first, which is pseudo-random.
    """
    hashes = digest(pair.output_a), digest(pair.output_b)
    if judge.sees_order and hashes[0] > hashes[1]:
        return pair.swapped(), (pair.case.example_id, *reversed(hashes))  # type: ignore[return-value]
    return pair, (pair.case.example_id, *hashes)


def _row(key: Key, shown: Verdict) -> dict[str, Any]:
    """Return a row (verdicts schema of data/schemas.py) of a verdict about the pair as it was shown."""
    example_id, output_a, output_b, order = key
    verdict = shown if order == AB else shown.swapped()
    return {"example_id": example_id, "output_a": output_a, "output_b": output_b, "order": order,
            "winner": verdict.winner, "p_a": verdict.p_a, "raw": json.dumps(verdict.raw)}  # fmt: skip


def _keys(table: pa.Table) -> list[Key]:
    columns = [table[name].to_pylist() for name in ("example_id", "output_a", "output_b", "order")]
    return list(zip(*columns, strict=True))
