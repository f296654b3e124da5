"""Judging of pairs, as the stage does it for each judge."""

from collections.abc import Sequence

from cpo_pipe.data.store import Rows
from cpo_pipe.eval.judges.base import Judge, Judgement, Pair
from cpo_pipe.eval.judging import make_verdicts, read_judgements


def judged(judge: Judge, pairs: Sequence[Pair], rows: Rows) -> list[Judgement]:
    """Return the judgements of `pairs`, in order, after asking for those that `rows` lacks."""
    make_verdicts(judge, pairs, rows)
    return read_judgements(judge, pairs, rows)
