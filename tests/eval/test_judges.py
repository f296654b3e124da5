from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.store import Store
from cpo_pipe.eval.judges import ExactJudge, Pair, SimilarityJudge, Verdict, judged

GSM8K = r"####\s*(-?[\d.,]+)"
ANGLES = {"target": 0.0, "near": 0.3, "far": 1.2, "as near": -0.3}


def _on_a_circle(texts: Sequence[str]) -> NDArray[np.float32]:
    return np.array([[np.cos(ANGLES[text]), np.sin(ANGLES[text])] for text in texts], np.float32)


def _pair(target: str, a: str, b: str) -> Pair:
    return Pair("example", target, a, b)


def test_exact_compares_without_case_and_white_space() -> None:
    pairs = [
        _pair("The  Answer\n", " the answer", "an answer"),
        _pair("x", "y", "X"),
        _pair("x", "x", " X\t"),
        _pair("x", "y", "z"),
        _pair("Straße", "STRASSE", "strase"),
    ]
    assert [verdict.winner for verdict in ExactJudge(None).judge(pairs)] == ["a", "b", "tie", "tie", "a"]


def test_exact_compares_the_first_group_where_a_pattern_is_given() -> None:
    judge = ExactJudge(GSM8K)
    target = "6 × 7 = 42\n#### 42"
    pairs = [_pair(target, "I guess #### 42 #### 7", "so it is 42"), _pair(target, "#### 41", "#### 42")]
    verdicts = judge.judge(pairs)
    assert [verdict.winner for verdict in verdicts] == ["a", "b"]
    assert verdicts[0] == Verdict("a", None, {"a": True, "b": False})
    assert judge.scores(["no answer"], ["no answer"]) == [0.0]  # nothing to be right about
    assert judge.answer("none") is None


def test_an_optional_group_that_took_no_part_is_no_answer() -> None:
    assert ExactJudge("yes(!)?").answer("yes") is None


def test_a_pattern_must_compile_and_have_a_group() -> None:
    with pytest.raises(InputError, match=r"evaluate\.exact_pattern is '\(': not a regular expression"):
        ExactJudge("(")
    with pytest.raises(InputError, match=r"evaluate\.exact_pattern is '####': it has no group"):
        ExactJudge("####")


def test_similarity_prefers_what_is_nearer_to_the_target() -> None:
    judge = SimilarityJudge(_on_a_circle, "fingerprint")
    pairs = [_pair("target", "near", "far"), _pair("target", "far", "near"), _pair("target", "near", "as near")]
    verdicts = judge.judge(pairs)
    assert [verdict.winner for verdict in verdicts] == ["a", "b", "tie"]
    assert verdicts[0].raw["a"] == pytest.approx(np.cos(0.3))
    assert verdicts[0].raw["b"] == pytest.approx(np.cos(1.2))


class CountingJudge:
    name = "counting"

    def __init__(self) -> None:
        self.asked: list[Pair] = []

    def spec(self) -> Spec:
        return {"judge": self.name}

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.asked += pairs
        return [Verdict("a", 0.9, {"said": pair.output_a}) for pair in pairs]


def test_a_verdict_is_asked_for_once(tmp_path: Path) -> None:
    judge = CountingJudge()
    pairs = [Pair("1", "t", "x", "y"), Pair("2", "t", "x", "y"), Pair("1", "t", "x", "y")]
    first = judged(judge, pairs, Store(tmp_path).rows("verdicts", judge.spec()))
    assert len(judge.asked) == 2

    more = [*pairs, Pair("1", "t", "other", "y")]
    again = judged(judge, more, Store(tmp_path).rows("verdicts", judge.spec()))

    assert judge.asked[2:] == [more[-1]]
    assert again[:3] == first
    assert again[3] == Verdict("a", 0.9, {"said": "other"})


def test_a_judge_that_fails_leaves_what_it_judged_and_no_more(tmp_path: Path) -> None:
    class FailingJudge(CountingJudge):
        def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
            if self.asked:
                raise RuntimeError
            return super().judge(pairs)

    rows = Store(tmp_path).rows("verdicts", {"judge": "counting"})
    pairs = [Pair(str(number), "t", "x", "y") for number in range(300)]
    with pytest.raises(RuntimeError):
        judged(FailingJudge(), pairs, rows)
    assert rows.num_rows() == 256

    judge = CountingJudge()
    assert len(judged(judge, pairs, rows)) == 300
    assert len(judge.asked) == 44


@pytest.mark.parametrize("judge", [ExactJudge("(a)"), SimilarityJudge(_on_a_circle, "other")])
def test_the_parameters_are_in_the_spec(judge: ExactJudge | SimilarityJudge) -> None:
    assert judge.spec() not in (ExactJudge(None).spec(), SimilarityJudge(_on_a_circle, "fingerprint").spec())
