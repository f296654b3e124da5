"""The judge `exact`: whether the output's answer equals the target's."""

import re
import unicodedata
from collections.abc import Sequence
from typing import ClassVar

import regex
from pydantic import Field, field_validator

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.eval.judges.base import Case, JudgeConfig, JudgeDependencies, ScoreJudge, ScoreMetric

RULES = 2
"""Version of the comparison. Raise it when the same texts get another verdict."""
SEARCH_SECONDS = 5.0
"""Time limit of one pattern search in one text: nested repeats can take exponential time."""

_NUMBER = re.compile(
    r"""([-+−]?) (?:[$€£¥]\ ?)? ([-+−]?)                                  # a sign before or after the currency
        ([1-9][0-9]{0,2}(?:,[0-9]{3})+ | [1-9][0-9]* | 0)? (\.[0-9]+)?    # thousands separated all or not at all
        (?:\ ?[$€£¥])?""",
    re.VERBOSE,
)
_REST_OF_NUMBER = re.compile(r"(?:,[0-9]{3}(?![0-9])|\.?[0-9])+")


class Exact(JudgeConfig):
    """Compare each output's answer with the target's answer."""

    pattern: str | None = Field(
        None,
        max_length=1000,
        description="regular expression whose first group is the answer; numbers are compared by value (default: the "
        "whole text is the answer)",
    )
    compares_to_target: ClassVar[bool] = True

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            groups = regex.compile(pattern).groups if pattern is not None else 1
        except (regex.error, RecursionError) as error:  # the latter: groups within hundreds of groups
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
        if not groups:
            raise ValueError(
                f"{pattern!r} has no group, and its first group is the answer; put the answer's part in parentheses"
            )
        return pattern

    def score_metric(self, name: str) -> ScoreMetric:
        """Return the share of correct answers."""
        description = "share of the outputs whose answer equals the target's; higher is better"
        return ScoreMetric(f"{name} match", description, is_share=True, on_terminal=True)

    def open(self, name: str, dependencies: JudgeDependencies) -> "ExactJudge":
        """Return the judge."""
        return ExactJudge(name, self.score_metric(name), self.pattern)


class ExactJudge(ScoreJudge):
    """Score 1 if the output's answer equals the target's, else 0.

    Case, white space and the Unicode form (NFC or NFD) are ignored. With a pattern, a full stop at the end is ignored,
    and numbers are compared by value: 2,125 is 2125, $18 is 18.0. A number consists of digits, a sign, a currency sign,
    a decimal point and well-formed thousands separators; `1,2`, `007` and `50%` are text.
    """

    def __init__(self, name: str, metric: ScoreMetric, pattern: str | None):
        """`pattern` is a regular expression whose first group is the answer; None compares whole texts."""
        super().__init__(name, metric)
        self._pattern = regex.compile(pattern) if pattern is not None else None

    def spec(self) -> Spec:
        """Return everything that decides a verdict."""
        return {"judge": "exact", "pattern": self._pattern.pattern if self._pattern else None, "rules": RULES}

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Return 1 for each correct output and 0 for the others. No output is correct if its target has no answer."""
        found = []
        for case, output in zip(cases, outputs, strict=True):
            answer = self.answer(case.target)
            found.append(float(answer is not None and self.answer(output) == answer))
        return found

    def check(self, targets: Sequence[str]) -> None:
        """Refuse a pattern that matches no target."""
        if self._unanswered(targets) == len(targets):
            assert self._pattern is not None
            raise InputError(
                f"evaluate.judges.{self.name}.pattern is {self._pattern.pattern!r}: it matches none of the "
                f"{len(targets)} targets, so no output could be correct; change it, or remove it to compare whole texts"
            )

    def notes(self, targets: Sequence[str]) -> list[str]:
        """Return how many targets the pattern does not match, or matches only in part."""
        notes, n = [], len(targets)
        if unanswered := self._unanswered(targets):
            notes.append(
                f"{self.name}: the pattern matches nothing in {unanswered} of {n} targets; every output for these "
                "counts as wrong"
            )
        if cuts := [cut for target in targets if (cut := self.cut_number(target))]:
            answer, number = cuts[0]
            notes.append(
                f"{self.name}: the pattern reads only a part of the number in {len(cuts)} of {n} targets, such as "
                f"{answer} of {number}: different numbers count as equal; extend the first group, as in "
                "####\\s*([-$€£¥]*[0-9,.]*[0-9])"
            )
        return notes

    def answer(self, text: str) -> str | None:
        """Return what is compared: the first match's first group, or the whole text; None if nothing matches."""
        if self._pattern is None:
            return normalized(text)
        match = self._match(self._pattern, text)
        return _normalized_answer(match[1]) if match else None

    def cut_number(self, text: str) -> tuple[str, str] | None:
        """Return the answer and the number that it is only the start of, such as 2 and 2,125; None if it is whole."""
        match = self._match(self._pattern, text) if self._pattern is not None else None
        if match is None or not match[1][-1:].isdigit():
            return None
        rest = _REST_OF_NUMBER.match(match.string, match.end(1))
        return (match[1], match[1] + rest[0]) if rest else None

    def _unanswered(self, targets: Sequence[str]) -> int:
        return sum(self.answer(target) is None for target in targets)

    def _match(self, pattern: "regex.Pattern[str]", text: str) -> "regex.Match[str] | None":
        try:
            match = pattern.search(unicodedata.normalize("NFC", text), timeout=SEARCH_SECONDS)
        except (TimeoutError, MemoryError) as error:
            raise InputError(
                f"evaluate.judges.{self.name}.pattern: {pattern.pattern!r} needs more than {SEARCH_SECONDS:g} "
                f"seconds, or too much memory, on the text {text[:60]!r}; avoid repeats within repeats such as (a|a)+"
            ) from error
        return match if match and match[1] is not None else None


def normalized(text: str) -> str:
    """Return the text in NFC, without differences of case and white space."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def _normalized_answer(text: str) -> str:
    """Return an answer as compared: a number in its shortest form, other text without a full stop at the end."""
    answer = normalized(text).removesuffix(".").rstrip()
    match = _NUMBER.fullmatch(answer)
    if match is None:
        return answer
    before, after, whole, fraction = (part or "" for part in match.groups())
    if not whole + fraction or (before and after):
        return answer
    value = (whole.replace(",", "") or "0") + fraction.rstrip("0").rstrip(".")
    return f"-{value}" if before + after in ("-", "−") and value != "0" else value
