"""Answers: where they are found, and which are equal."""

import pytest

from cpo_pipe.data import final_answer
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.final_answer import PATTERNS, AnswerFinder, normalized_answer


def finder(pattern: str | None) -> AnswerFinder:
    return AnswerFinder(pattern, "evaluate.judges.exact.pattern")


@pytest.mark.parametrize(
    ("target", "same", "other"),
    [
        (
            "18",
            ["18.", "18.0", "18.00", "$18", "18 $", "€ 18", "¥18", "₹18", "￥１８", "１８", "１８。", "+18", "١٨"],
            ["-18", "1.8", "180", "18%", "018", "1 8", "18²", "⑱"],
        ),
        (
            "2,125",
            ["2125", "2,125.", "$2,125", "2125.00", "2,125.0", "２,１２５", "２，１２５"],
            ["2,999", "2", "125", "21,25", "2.125"],
        ),
        (
            "1,000.50",
            ["1000.5", "1000.500", "$1,000.50", "1,000.50 €", "１,０００．５"],
            ["1,000", "1,000.05", "100,050", "1.000,50"],
        ),
        ("-3", ["−3", "-3.0", "-$3", "$-3", "－３", "-3."], ["3", "- 3", "--3", "-3.3", "-30"]),
        ("€ 5", ["5", "5 €", "€5.00", "5."], ["-5", "50", "0.5"]),
        ("50%", ["50 %", "50.0%", "50%.", "５０％"], ["50", "0.5", "5%", "-50%"]),
        ("72", ["72.", "72.0", "£72", "¥72.00", "$72$"], ["7", "72.5", "-72", "722", "7,2"]),
        ("0.5", [".5", "0.50"], ["5", "0.05", "0,5", "1/2"]),
        ("1,2", ["1,2."], ["12", "1.2", "1,20"]),
        ("1,000,000", ["1000000", "1,000,000.0"], ["1000,000", "1,0000,00", "1,000,001"]),
        ("007", ["007."], ["7", "07"]),
        ("0", ["-0", "0.0", "0.", "$0"], ["00", "10", "0%"]),
        ("0%", ["-0%", "0.0%"], ["0", "10%"]),
        ("Zürich", ["zu\u0308rich", "ZÜRICH.", " Zürich\n"], ["Zurich", "Zürich!"]),
        ("Straße", ["STRASSE"], ["Strase"]),
        ("The  Answer", ["the answer.", "THE\tanswer"], ["theanswer", "answer"]),
        ("$", ["$."], ["", "0"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pattern", [None, "A: (.*)"])
def test_equal_answers_are_written_in_many_ways(
    pattern: str | None, target: str, same: list[str], other: list[str]
) -> None:
    """The same form whether a pattern found the answer or it is the whole text."""
    written = "so A: {}\nB" if pattern else "{}"
    texts = [*same, *other] if pattern is None else [each.strip("\n") for each in (*same, *other)]
    found = {text: finder(pattern).agree(written.format(text), written.format(target)) for text in texts}
    assert found == {text: place < len(same) for place, text in enumerate(texts)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("#### 18.", "18"),
        ("#### 18.50.", "18.5"),
        ("#### $18", "18"),
        ("####18 dollars", "18"),
        ("#### $ 1,000.50 in all", "1000.5"),
        ("#### -3", "-3"),
        ("#### -$3", "-3"),
        ("#### € 5", "5"),
        ("#### 50%", "50"),
        ("#### １８", "18"),
        ("#### 2,125\nQuestion: #### 9", "2125"),
        ("#### 1,2", "1,2"),
        ("18", None),
        ("#### none", None),
        ("#### - 3", None),
        ("#### ,", None),
    ],
)
def test_gsm8k_answers_are_the_numbers_after_four_hashes(text: str, answer: str | None) -> None:
    """As its own pattern finds them, `#### (\\-?[0-9\\.\\,]+)`, but for full stops and currency signs."""
    assert finder("gsm8k").answer(text) == answer


def test_a_named_pattern_is_identified_by_its_text() -> None:
    assert finder("gsm8k").spec() == finder(PATTERNS["gsm8k"]).spec() == {"pattern": PATTERNS["gsm8k"], "rules": 3}


def test_no_text_agrees_with_a_target_without_an_answer() -> None:
    assert not finder("gsm8k").agree("no answer", "no answer")
    assert finder("gsm8k").answer("none") is None
    assert finder("yes(!)?").answer("yes") is None, "an optional group that took no part"


def test_normal_forms() -> None:
    assert [normalized_answer(text) for text in ("$1,000.50", "-0.0", "A B.", "50.0 %")] == [
        "1000.5",
        "0",
        "a b",
        "50%",
    ]


def test_a_pattern_matches_composed_letters_in_a_decomposed_text() -> None:
    assert finder("R\u00e9ponse: (.*)").answer("Re\u0301ponse: 7") == "7"


@pytest.mark.parametrize(
    ("pattern", "text", "cut"),
    [
        (r"####\s*(-?[0-9.]+)", "#### 2,125", ("2", "2,125")),
        (r"####\s*(-?[0-9]+)", "#### 2,125,000.50 in all", ("2", "2,125,000.50")),
        (r"####\s*(-?[0-9]+)", "#### 2.5", ("2", "2.5")),
        (r"####\s*(-?[0-9]+)", "#### 72.", None),
        (r"####\s*(-?[0-9]+)", "#### 1,2,3", None),
        (r"####\s*([a-z]+)", "#### a5", None),
        ("gsm8k", "#### 2,125.50.", None),
        (None, "2,125", None),
    ],
)
def test_a_pattern_that_cuts_a_number_is_found(pattern: str | None, text: str, cut: tuple[str, str] | None) -> None:
    assert finder(pattern).cut_number(text) == cut


def test_notes_count_targets_without_a_whole_answer() -> None:
    notes = finder(r"####\s*(-?[0-9]+)").notes(["#### 2,125", "#### 7", "no"], "they count as wrong")
    assert notes[0] == "the pattern matches nothing in 1 of 3 targets; they count as wrong"
    assert notes[1].startswith("the pattern reads only a part of the number in 1 of 3 targets, such as 2 of 2,125:")
    assert finder("gsm8k").notes(["#### 2,125", "#### 7"], "") == []


def test_a_pattern_that_matches_no_target_is_refused() -> None:
    with pytest.raises(InputError, match="pattern is 'gsm8k': it matches none of the 2 targets"):
        finder("gsm8k").check(["7", "8"])
    finder("gsm8k").check(["7", "#### 8"])
    finder("gsm8k").check([])


def test_a_pattern_that_needs_exponential_time_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further `a` doubles the ways to match: 40 of them take `re` days."""
    monkeypatch.setattr(final_answer, "SEARCH_SECONDS", 0.2)
    with pytest.raises(InputError, match=r"evaluate\.judges\.exact\.pattern: '\(a\|a\)\+\$' needs more than 0\.2 s"):
        finder("(a|a)+$").answer("a" * 40 + "b")
    with pytest.raises(InputError, match="avoid repeats within repeats"):
        finder("(?R)(a)").answer("a" * 40)
