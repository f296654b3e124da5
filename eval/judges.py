"""Judges: which of two outputs for one prompt is the better. Both here go by a score against the target.

A verdict is kept in the store by example and by the hashes of both outputs, so that a judge is asked only once.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Unit vectors of texts, (n, d)."""

COSINE_NOISE = 1e-6
"""Cosines nearer to each other than this are a tie: so much depends on what a text was batched with."""

BATCH = 256
"""Pairs judged between two writes."""

ORDER = "ab"
"""These judges see no order; the column is for those that do."""


@dataclass(frozen=True)
class Pair:
    """Two outputs for one prompt."""

    example_id: str
    target: str
    output_a: str
    output_b: str

    def key(self) -> tuple[str, str, str]:
        """Its row key, without the order."""
        return self.example_id, digest(self.output_a), digest(self.output_b)


@dataclass(frozen=True)
class Verdict:
    """One judgement."""

    winner: Literal["a", "b", "tie"]
    p_a: float | None
    """The judge's probability that A is better, where it gives one."""
    raw: Mapping[str, Any]
    """What was measured; plain JSON values."""


class Judge(Protocol):
    """Something that compares two outputs for the same prompt."""

    name: str

    def spec(self) -> Spec:
        """What decides its verdicts."""
        ...

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict for each pair, in order."""
        ...


class ExactJudge:
    """Right or wrong: the output's answer is the target's. Both right, or both wrong, is a tie."""

    name = "exact"
    score_name = "exact match"

    def __init__(self, pattern: str | None):
        self._pattern = _compiled(pattern) if pattern is not None else None

    def spec(self) -> Spec:
        """What decides its verdicts."""
        return {"judge": self.name, "pattern": self._pattern.pattern if self._pattern else None}

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict for each pair, in order."""
        targets = [pair.target for pair in pairs]
        right_a = self.scores([pair.output_a for pair in pairs], targets)
        right_b = self.scores([pair.output_b for pair in pairs], targets)
        return [
            Verdict(_higher(a, b), None, {"a": bool(a), "b": bool(b)}) for a, b in zip(right_a, right_b, strict=True)
        ]

    def scores(self, outputs: Sequence[str], targets: Sequence[str]) -> list[float]:
        """1 for each output that is right, 0 for the others. A target without an answer makes none right."""
        return [float(self._is_right(output, target)) for output, target in zip(outputs, targets, strict=True)]

    def answer(self, text: str) -> str | None:
        """What is compared: the first match's first group, or the whole text; None where nothing matches."""
        if self._pattern is None:
            return normalized(text)
        match = self._pattern.search(text)
        return normalized(match[1]) if match and match[1] is not None else None

    def _is_right(self, output: str, target: str) -> bool:
        answer = self.answer(target)
        return answer is not None and self.answer(output) == answer


class SimilarityJudge:
    """Nearer to the target: the higher cosine between the embeddings of output and target."""

    name = "similarity"
    score_name = "cosine to target"

    def __init__(self, encode: Encode, fingerprint: str):
        self._encode = encode
        self._fingerprint = fingerprint

    def spec(self) -> Spec:
        """What decides its verdicts."""
        return {"judge": self.name, "embedder": self._fingerprint}

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict for each pair, in order."""
        targets = [pair.target for pair in pairs]
        cosine_a = self.scores([pair.output_a for pair in pairs], targets)
        cosine_b = self.scores([pair.output_b for pair in pairs], targets)
        return [
            Verdict(_higher(a, b, COSINE_NOISE), None, {"a": a, "b": b})
            for a, b in zip(cosine_a, cosine_b, strict=True)
        ]

    def scores(self, outputs: Sequence[str], targets: Sequence[str]) -> list[float]:
        """Cosine of each output to its target, −1 to 1."""
        cosines = np.einsum("nd,nd->n", self._encode(outputs), self._encode(targets))
        return [min(1.0, max(-1.0, float(cosine))) for cosine in cosines]


def normalized(text: str) -> str:
    """Text without what `exact` does not look at: case, and how much white space there is and where."""
    return " ".join(text.casefold().split())


def judged(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> list[Verdict]:
    """The verdicts of `pairs`, in order; the judge is asked for those that `rows` lacks."""
    keys = [pair.key() for pair in pairs]
    wanted = _key_table(keys)
    if rows.missing(wanted).num_rows:
        with rows.lock(), rows.writer() as writer:
            missing = set(_keys(rows.missing(wanted)))
            todo = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key in missing}.values())
            with track(f"judge {judge.name}", len(todo)) as meter:
                for start in range(0, len(todo), BATCH):
                    batch = todo[start : start + BATCH]
                    writer.add([_row(pair, verdict) for pair, verdict in zip(batch, judge.judge(batch), strict=True)])
                    meter.advance(len(batch))
    table = rows.read(list(dict.fromkeys(pair.example_id for pair in pairs)))
    found = dict(zip(_keys(table), table.to_pylist(), strict=True))
    return [Verdict(found[key]["winner"], found[key]["p_a"], json.loads(found[key]["raw"])) for key in keys]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"evaluate.exact_pattern is {pattern!r}: not a regular expression ({error})") from error
    if not compiled.groups:
        raise InputError(
            f"evaluate.exact_pattern is {pattern!r}: it has no group, and its first group is the answer; "
            "put the answer's part in parentheses"
        )
    return compiled


def _higher(a: float, b: float, noise: float = 0.0) -> Literal["a", "b", "tie"]:
    if abs(a - b) <= noise:
        return "tie"
    return "a" if a > b else "b"


def _row(pair: Pair, verdict: Verdict) -> dict[str, Any]:
    example_id, output_a, output_b = pair.key()
    return {"example_id": example_id, "output_a": output_a, "output_b": output_b, "order": ORDER,
            "winner": verdict.winner, "p_a": verdict.p_a, "raw": json.dumps(verdict.raw)}  # fmt: skip


def _key_table(keys: Iterable[tuple[str, str, str]]) -> pa.Table:
    # One row per key: two systems may have written the same.
    distinct = list(dict.fromkeys(keys))
    columns = zip(*distinct, strict=True) if distinct else ([], [], [])
    names = ("example_id", "output_a", "output_b")
    table = pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})
    return table.append_column("order", pa.array([ORDER] * table.num_rows, pa.string()))


def _keys(table: pa.Table) -> list[tuple[str, str, str]]:
    columns = [table[name].to_pylist() for name in ("example_id", "output_a", "output_b")]
    return list(zip(*columns, strict=True))
