"""What is shown of a library's error."""

from itertools import pairwise

from cpo_pipe.data.errors import cause


def chained(*errors: Exception) -> Exception:
    """The first error, caused by the second, which the third caused."""
    for error, because in pairwise(errors):
        error.__cause__ = because
    return errors[0]


def test_the_first_line_is_shown() -> None:
    assert cause(ValueError("one.\n two\n three")) == "one"
    assert cause(ValueError("\n\n  one \n two")) == "one"
    assert cause(ValueError()) == "ValueError"
    assert cause(KeyError("model")) == "KeyError: 'model'", "the bare key says nothing"


def test_a_line_that_announces_another_is_shown_with_it() -> None:
    assert cause(RuntimeError("Errors in state_dict:\n\tsize mismatch for a:\n  2 and 3.\n x")) == (
        "Errors in state_dict: size mismatch for a: 2 and 3"
    )
    assert cause(ValueError("nothing follows:")) == "nothing follows:"


def test_the_cause_is_shown_too() -> None:
    assert cause(chained(ValueError("no data set"), OSError("between"), TypeError("row 3 is bad"))) == (
        "no data set: row 3 is bad"
    )
    assert cause(chained(ValueError("no data set: row 3 is bad"), TypeError("row 3 is bad"))) == (
        "no data set: row 3 is bad"
    )
    assert cause(chained(ValueError("a"), KeyError("b"))) == "a: KeyError: 'b'"
    ring = ValueError("a")
    ring.__cause__ = ring
    assert cause(ring) == "a"
    one, two = ValueError("a"), ValueError("b")
    one.__cause__, two.__cause__ = two, one
    assert cause(one) == "a: b"


def test_it_is_one_visible_line_of_bounded_length() -> None:
    assert cause(ValueError("a\x1b]0;t\x07b \u202e \x9b2J\tc")) == r"a\x1b]0;t\x07b \u202e \x9b2J c"
    assert cause(ValueError("x" * 1000)) == "x" * 299 + "…"
