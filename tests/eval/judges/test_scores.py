"""Judges by score, and how verdicts are kept whoever gives them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.eval.judges.base import Case, Judgement, Pair, ScoreJudge, Verdict
from cpo_pipe.eval.judges.exact import Exact, ExactJudge
from cpo_pipe.eval.judges.longer import Longer, LongerJudge
from cpo_pipe.eval.judges.similarity import Encode, Similarity, SimilarityJudge
from cpo_pipe.eval.judging import read_judgements
from tests.support.verdicts import judged

GSM8K = r"####\s*(-?[\d.,]+)"
ANGLES = {"target": 0.0, "near": 0.3, "far": 1.2, "as near": -0.3}


def _on_a_circle(texts: Sequence[str]) -> NDArray[np.float32]:
    return np.array([[np.cos(ANGLES[text]), np.sin(ANGLES[text])] for text in texts], np.float32)


def case(target: str = "t", example_id: str = "example") -> Case:
    return Case(example_id, "p", "<p>", target)


def exact_judge(pattern: str | None, name: str = "exact") -> ExactJudge:
    return ExactJudge(name, Exact(kind="exact").score_metric(name), pattern)


def similarity_judge(encode: Encode, fingerprint: str, name: str = "similarity") -> SimilarityJudge:
    return SimilarityJudge(name, Similarity(kind="similarity").score_metric(name), encode, fingerprint)


def longer_judge(name: str = "longer") -> LongerJudge:
    return LongerJudge(name, Longer(kind="longer").score_metric(name))


def _verdicts(judge: ScoreJudge, pairs: Sequence[Pair]) -> list[Verdict]:
    ((*verdicts,),) = judge.judge(pairs)
    assert [place for place, _ in verdicts] == list(range(len(pairs)))
    return [verdict for _, verdict in verdicts]


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exact_compares_without_case_and_white_space() -> None:
    pairs = [
        Pair(case("The  Answer\n"), " the answer", "an answer"),
        Pair(case("x"), "y", "X"),
        Pair(case("x"), "x", " X\t"),
        Pair(case("x"), "y", "z"),
        Pair(case("Straße"), "STRASSE", "strase"),
    ]
    assert [verdict.winner for verdict in _verdicts(exact_judge(None), pairs)] == ["a", "b", "tie", "tie", "a"]


def test_exact_compares_the_first_group_where_a_pattern_is_given() -> None:
    judge = exact_judge(GSM8K)
    target = case("6 × 7 = 42\n#### 42")
    verdicts = _verdicts(judge, [Pair(target, "I guess #### 42 #### 7", "so 42"), Pair(target, "#### 41", "#### 42")])
    assert verdicts == [Verdict("a", None, {"a": 1, "b": 0}), Verdict("b", None, {"a": 0, "b": 1})]
    assert judge.scores([case("no answer")], ["no answer"]) == [0.0]  # nothing to be right about


def test_similarity_prefers_what_is_nearer_to_the_target() -> None:
    target = case("target")
    pairs = [Pair(target, "near", "far"), Pair(target, "far", "near"), Pair(target, "near", "as near")]
    verdicts = _verdicts(similarity_judge(_on_a_circle, "fingerprint"), pairs)
    assert [verdict.winner for verdict in verdicts] == ["a", "b", "tie"]
    assert verdicts[0].raw["a"] == pytest.approx(np.cos(0.3))
    assert verdicts[0].raw["b"] == pytest.approx(np.cos(1.2))


def test_longer_counts_characters() -> None:
    pairs = [Pair(case(), "ab", "a"), Pair(case(), "", "a"), Pair(case(), "é", "a")]
    assert [verdict.winner for verdict in _verdicts(longer_judge(), pairs)] == ["a", "b", "tie"]


def test_specs_of_what_was_judged_before_there_were_names() -> None:
    """Verdicts that are in stores are addressed by these."""
    assert exact_judge("(a)", "right").spec() == {"judge": "exact", "pattern": "(a)", "rules": 3}
    assert exact_judge(None).spec() == {"judge": "exact", "pattern": None, "rules": 3}
    assert similarity_judge(_on_a_circle, "f", "near").spec() == {"judge": "similarity", "embedder": "f", "rules": 2}


def test_names_name_scores() -> None:
    assert exact_judge(None).metric.name == "exact match"
    assert longer_judge("size").metric.name == "size characters"
    assert similarity_judge(_on_a_circle, "f", "near").metric.name == "cosine to target"


# ── how verdicts are kept ────────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """Says of the output shown first what its script says."""

    name = "scripted"

    def __init__(self, *, sees_order: bool = True, both: bool = True, **wins: float | None):
        self.sees_order = sees_order
        self.orders: Sequence[str] = ("ab", "ba") if both else ("ab",)
        self.wins = wins
        self.asked: list[Pair] = []

    def spec(self) -> Spec:
        return {"judge": self.name}

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        for place, pair in reversed(list(enumerate(pairs))):
            self.asked.append(pair)
            p_a = self.wins.get(pair.output_a)
            yield [(place, Verdict("a", p_a, {"first": pair.output_a}))]

    def rows(self, root: Path) -> Rows:
        return Store(root).rows("verdicts", self.spec())


def test_a_verdict_is_asked_for_once(tmp_path: Path) -> None:
    judge = Scripted(sees_order=False, both=False)
    pairs = [
        Pair(case(example_id="1"), "x", "y"),
        Pair(case(example_id="2"), "x", "y"),
        Pair(case(example_id="1"), "x", "y"),
    ]
    first = judged(judge, pairs, judge.rows(tmp_path))
    assert len(judge.asked) == 2
    assert [judgement.winner for judgement in first] == ["a"] * 3

    more = [*pairs, Pair(case(example_id="1"), "other", "y")]
    again = judged(judge, more, judge.rows(tmp_path))

    assert judge.asked[2:] == [more[-1]]
    assert again[:3] == first
    assert again[3] == Judgement({"ab": Verdict("a", None, {"first": "other"})})


def test_a_judge_that_fails_leaves_what_it_judged_and_no_more(tmp_path: Path) -> None:
    class Failing(Scripted):
        def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
            yield [(place, Verdict("b", None, {})) for place in range(256)]
            raise RuntimeError

    rows = Scripted().rows(tmp_path)
    pairs = [Pair(case(example_id=str(number)), "x", "y") for number in range(300)]
    with pytest.raises(RuntimeError):
        judged(Failing(both=False), pairs, rows)
    assert rows.num_rows() == 256

    judge = Scripted(both=False)
    with pytest.raises(RunError, match="judge scripted: 44 verdicts are missing; run the same command again"):
        read_judgements(judge, pairs, rows)
    assert len(judged(judge, pairs, rows)) == 300
    assert len(judge.asked) == 44


def test_each_pair_is_shown_in_both_orders(tmp_path: Path) -> None:
    judge = Scripted()
    (judgement,) = judged(judge, [Pair(case(), "x", "y")], judge.rows(tmp_path))
    assert {(pair.output_a, pair.output_b) for pair in judge.asked} == {("x", "y"), ("y", "x")}
    said = {order: (verdict.winner, verdict.raw["first"]) for order, verdict in judgement.by_order.items()}
    assert said == {"ab": ("a", "x"), "ba": ("b", "y")}, "it always takes the first"
    assert (judgement.winner, judgement.flipped, judgement.for_first) == ("tie", True, (2, 2))


@pytest.mark.parametrize("both", [True, False])
def test_changed_over_a_pair_is_the_same_pair(tmp_path: Path, both: bool) -> None:
    judge = Scripted(both=both, x=0.9, y=0.3, z=0.5)
    pairs = [Pair(case(), "x", "y"), Pair(case(), "y", "z"), Pair(case(), "x", "z")]
    there = judged(judge, pairs, judge.rows(tmp_path))
    count = len(judge.asked)
    assert count == (6 if both else 3)
    back = judged(judge, [pair.swapped() for pair in pairs], judge.rows(tmp_path))
    assert len(judge.asked) == count, "nothing is asked again"
    for one, other in zip(there, back, strict=True):
        assert {"a": "b", "b": "a", "tie": "tie"}[one.winner] == other.winner
        assert one.p_a == pytest.approx(1 - other.p_a)  # type: ignore[operator]
        assert one.for_first == other.for_first
        for order, verdict in one.by_order.items():
            assert other.by_order[order[::-1]].raw == verdict.raw
            assert (order == "ab") == (verdict.raw["first"] == pairs[there.index(one)].output_a)
    if both:
        # P(x) of (x, y): 0.9 shown first; shown second 1 − 0.3. The mean decides.
        assert [judgement.p_a for judgement in there] == pytest.approx([0.8, 0.4, 0.7])
        assert [judgement.winner for judgement in there] == ["a", "b", "a"]


def test_a_judge_that_sees_no_order_finds_verdicts_as_they_were_kept(tmp_path: Path) -> None:
    """Rows of either direction stand in stores from before pairs were turned."""
    judge = Scripted(sees_order=False, both=False)
    first, second = sorted(("x", "y"), key=digest)
    for pair in (Pair(case(), first, second), Pair(case(), second, first)):
        judged(judge, [pair], judge.rows(tmp_path))
        assert judge.asked[-1] == pair


def test_equal_outputs_are_a_tie_that_nobody_is_asked_about(tmp_path: Path) -> None:
    judge = Scripted()
    (judgement,) = judged(judge, [Pair(case(), "same", "same")], judge.rows(tmp_path))
    assert judge.asked == []
    assert (judgement.winner, judgement.p_a, judgement.flipped, judgement.unparseable) == ("tie", None, None, None)
    assert judgement.for_first == (0, 0)


UNREAD: dict[str, Any] = {"unparseable": "no verdict"}


@pytest.mark.parametrize(
    ("ab", "ba", "winner", "flipped", "for_first", "unparseable"),
    [
        (("a", {}), ("a", {}), "a", False, (1, 2), 0),
        (("b", {}), ("b", {}), "b", False, (1, 2), 0),
        (("b", {}), ("a", {}), "tie", True, (0, 2), 0),
        (("a", {}), ("tie", {}), "tie", True, (1, 1), 0),
        (("tie", {}), ("tie", {}), "tie", False, (0, 0), 0),
        (("a", {}), ("tie", UNREAD), "tie", None, (1, 1), 0.5),
        (("tie", UNREAD), ("tie", UNREAD), "tie", None, (0, 0), 1),
    ],
)
def test_what_two_orders_come_to(
    ab: Any, ba: Any, winner: str, flipped: bool | None, for_first: tuple[int, int], unparseable: float
) -> None:
    judgement = Judgement({order: Verdict(said, None, raw) for order, (said, raw) in (("ab", ab), ("ba", ba))})
    assert (judgement.winner, judgement.flipped) == (winner, flipped)
    assert (judgement.for_first, judgement.unparseable) == (for_first, unparseable)


def test_probabilities_that_only_follow_the_order_are_a_tie() -> None:
    judgement = Judgement({"ab": Verdict("a", 0.9, {}), "ba": Verdict("b", 1 - 0.9, {})})
    assert judgement.winner == "tie"
    assert Judgement({"ab": Verdict("a", 0.9, {}), "ba": Verdict("b", 0.2, {})}).winner == "a"
