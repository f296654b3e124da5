"""The final answer in a text: what a pattern finds, in a form in which equal answers are equal strings.

The ranker and the filter `exact` (`pipeline/scorers/`) and the judge `exact` (`eval/judges/`) compare answers with it.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import regex
from pydantic import AfterValidator, Field

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec

RULES = 3
"""Version of the comparison. Raise it when two texts are equal that were not, or the reverse."""
SEARCH_SECONDS = 5.0
"""Time limit of one pattern search in one text: nested repeats can take exponential time."""

PATTERNS = {
    # As GSM8K's own `#### (\-?[0-9\.\,]+)`, and with currency signs; a full stop behind the number is not part of it.
    "gsm8k": r"####\s*((?:[-+−]?\p{Sc} ?)?[-+−]?[\d,.]*\d)",
}
"""Patterns by name."""

_NUMBER = regex.compile(
    r"""([-+−]?) (?:\p{Sc}\ ?)? ([-+−]?)                                  # a sign before or after the currency
        ([1-9][0-9]{0,2}(?:,[0-9]{3})+ | [1-9][0-9]* | 0)? (\.[0-9]+)?    # thousands separated all or not at all
        (?:\ ?\p{Sc})? (?:\ ?(%))?""",
    regex.VERBOSE,
)
_REST_OF_NUMBER = regex.compile(r"(?:,[0-9]{3}(?![0-9])|\.?[0-9])+")
_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {0xFFE0: "¢", 0xFFE1: "£", 0xFFE5: "¥"}


def _check_pattern(pattern: str | None) -> str | None:
    if pattern is None or pattern in PATTERNS:
        return pattern
    try:
        groups = regex.compile(pattern).groups
    except (regex.error, RecursionError) as error:  # the latter: groups within hundreds of groups
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
    if not groups:
        raise ValueError(
            f"{pattern!r} has no group, and its first group is the answer; put the answer's part in parentheses, or "
            f"name a pattern ({', '.join(PATTERNS)})"
        )
    return pattern


Pattern = Annotated[
    str | None,
    Field(
        max_length=1000,
        description="regular expression whose first group is the answer, or `gsm8k` (the number after ####); numbers "
        "are compared by value (default: the whole text is the answer)",
    ),
    AfterValidator(_check_pattern),
]
"""A key of a recipe: a name in PATTERNS, a regular expression, or None."""


@dataclass(frozen=True)
class AnswerFinder:
    """Finds the final answer of a text.

    Answers are compared without case, white space, the Unicode form (NFC or NFD) and a full stop at the end. Numbers
    are compared by value: 2,125 is 2125, $18 is 18.0, ７ is 7. A number consists of digits of any script, a sign, a
    currency sign, a decimal point and well-formed thousands separators; `1,2`, `007` and `1/2` are text. A percentage
    equals only a percentage: `50%` is `50.0 %`, and neither 50 nor 0.5.
    """

    pattern: str | None
    """A name in PATTERNS, a regular expression whose first group is the answer, or None: the whole text."""
    key: str
    """The pattern's key in the recipe, for messages."""

    def spec(self) -> Spec:
        """Return what decides an answer; of a named pattern its text."""
        return {"pattern": self._written, "rules": RULES}

    def answer(self, text: str) -> str | None:
        """Return the answer as compared: the first match's first group, or the whole text; None if nothing matches.

        Raises:
            InputError: the search takes too long.
        """
        if self._written is None:
            return normalized_answer(text)
        match = self._match(text)
        return normalized_answer(match[1]) if match else None

    def agree(self, text: str, target: str) -> bool:
        """Return whether a text's answer equals the target's; no text agrees with a target without an answer."""
        answer = self.answer(target)
        return answer is not None and self.answer(text) == answer

    def cut_number(self, text: str) -> tuple[str, str] | None:
        """Return the answer and the number that it is only the start of, such as 2 and 2,125; None if it is whole."""
        match = self._match(text)
        if match is None or not match[1][-1:].isdigit():
            return None
        rest = _REST_OF_NUMBER.match(match.string, match.end(1))
        return (match[1], match[1] + rest[0]) if rest else None

    def check(self, targets: Sequence[str]) -> None:
        """Refuse a pattern that matches no target.

        Raises:
            InputError: no target has an answer.
        """
        if targets and all(self.answer(target) is None for target in targets):
            raise InputError(
                f"{self.key} is {self.pattern!r}: it matches none of the {len(targets)} targets, so no text could be "
                "correct; change it, or remove it to compare whole texts"
            )

    def notes(self, targets: Sequence[str], without: str) -> list[str]:
        """Return how many targets the pattern does not match, or matches only in part.

        Args:
            targets: the targets.
            without: what follows for a target without an answer, for the message.
        """
        notes, n = [], len(targets)
        if unanswered := sum(self.answer(target) is None for target in targets):
            notes.append(f"the pattern matches nothing in {unanswered} of {n} targets; {without}")
        if cuts := [cut for target in targets if (cut := self.cut_number(target))]:
            answer, number = cuts[0]
            notes.append(
                f"the pattern reads only a part of the number in {len(cuts)} of {n} targets, such as {answer} of "
                f"{number}: different numbers count as equal; extend the first group, as in "
                r"answer is ([-+−\p{Sc}]*[\d,.]*\d)"
            )
        return notes

    @cached_property
    def _written(self) -> str | None:
        return PATTERNS.get(self.pattern, self.pattern) if self.pattern is not None else None

    def _match(self, text: str) -> "regex.Match[str] | None":
        if self._written is None:
            return None
        try:
            match = regex.search(self._written, unicodedata.normalize("NFC", text), timeout=SEARCH_SECONDS)
        except (TimeoutError, MemoryError) as error:
            raise InputError(
                f"{self.key}: {self.pattern!r} needs more than {SEARCH_SECONDS:g} seconds, or too much memory, on the "
                f"text {text[:60]!r}; avoid repeats within repeats such as (a|a)+"
            ) from error
        return match if match and match[1] is not None else None


def normalized_answer(text: str) -> str:
    """Return an answer as compared: a number in its shortest form, other text without a full stop at the end."""
    answer = _without_case_and_spaces(text)
    answer = (answer[:-1] if answer.endswith((".", "。", "．")) else answer).rstrip()
    match = _NUMBER.fullmatch(_ascii(answer))
    if match is None:
        return answer
    before, after, whole, fraction, percent = (part or "" for part in match.groups())
    if not whole + fraction or (before and after):
        return answer
    value = (whole.replace(",", "") or "0") + fraction.rstrip("0").rstrip(".") + percent
    return f"-{value}" if before + after in ("-", "−") and value.strip("0%") else value


def _without_case_and_spaces(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def _ascii(text: str) -> str:
    """Return a text with the decimal digits of all scripts as 0–9, and full-width signs as those of ASCII."""
    return "".join(str(unicodedata.decimal(character, character)) for character in text.translate(_FULL_WIDTH))
