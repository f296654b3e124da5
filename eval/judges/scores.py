"""Judges that give each output a score by itself: the higher one wins."""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import regex
from numpy.typing import NDArray

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.eval.judges.base import AB, NOISE, Case, Pair, Verdict, higher

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Unit vectors of texts, (n, d)."""

RULES = 2
"""Raise when `ExactJudge` or `SimilarityJudge` comes to compare the same texts otherwise."""
SEARCH_SECONDS = 5.0
"""Longest search of a pattern in one text; repeats within repeats can take longer than anyone waits."""

_NUMBER = re.compile(
    r"""([-+−]?) (?:[$€£¥]\ ?)? ([-+−]?)                                  # a sign before or after the currency
        ([1-9][0-9]{0,2}(?:,[0-9]{3})+ | [1-9][0-9]* | 0)? (\.[0-9]+)?    # thousands separated all or not at all
        (?:\ ?[$€£¥])?""",
    re.VERBOSE,
)
_REST_OF_NUMBER = re.compile(r"(?:,[0-9]{3}(?![0-9])|\.?[0-9])+")


class ScoreJudge(ABC):
    """The output with the higher score wins; equal scores are a tie. It sees no order."""

    sees_order = False
    orders: Sequence[str] = (AB,)
    noise = 0.0
    """Scores nearer to each other than this are equal."""

    def __init__(self, name: str, score_name: str):
        """`score_name` is the metric that is the mean score of a system's outputs."""
        self.name, self.score_name = name, score_name

    @abstractmethod
    def spec(self) -> Spec:
        """What decides its verdicts."""

    @abstractmethod
    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """The score of each output, written for the case at its place."""

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """All verdicts at once; `raw` holds both scores."""
        cases = [pair.case for pair in pairs]
        a = self.scores(cases, [pair.output_a for pair in pairs])
        b = self.scores(cases, [pair.output_b for pair in pairs])
        yield [
            (place, Verdict(higher(x, y, self.noise), None, {"a": x, "b": y}))
            for place, (x, y) in enumerate(zip(a, b, strict=True))
        ]


class ExactJudge(ScoreJudge):
    """Right (1) or wrong (0): the output's answer equals the target's. Both right, or both wrong, is a tie.

    Case, white space and the Unicode form (NFC or NFD) never count. With a pattern, a full stop at the end does not
    count either, and numbers are compared by value: 2,125 is 2125, $18 is 18.0. A number consists of digits, a sign, a
    currency sign, a decimal point and well-formed thousands separators; `1,2`, `007` and `50%` are text.
    """

    def __init__(self, name: str, pattern: str | None):
        """`pattern` is a regular expression whose first group is the answer; None compares whole texts."""
        super().__init__(name, f"{name} match")
        self._pattern = regex.compile(pattern) if pattern is not None else None

    def spec(self) -> Spec:
        """What decides its verdicts."""
        return {"judge": "exact", "pattern": self._pattern.pattern if self._pattern else None, "rules": RULES}

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """1 for each output that is right, 0 for the others. A target without an answer makes none right."""
        return [float(self._is_right(output, case.target)) for case, output in zip(cases, outputs, strict=True)]

    def answer(self, text: str) -> str | None:
        """Return what is compared: the first match's first group, or the whole text; None where nothing matches."""
        if self._pattern is None:
            return normalized(text)
        match = self._match(self._pattern, text)
        return _normalized_answer(match[1]) if match else None

    def cut_number(self, text: str) -> tuple[str, str] | None:
        """Return the answer and the number it is only the start of, such as 2 and 2,125; None where it is whole."""
        match = self._match(self._pattern, text) if self._pattern is not None else None
        if match is None or not match[1][-1:].isdigit():
            return None
        rest = _REST_OF_NUMBER.match(match.string, match.end(1))
        return (match[1], match[1] + rest[0]) if rest else None

    def _match(self, pattern: "regex.Pattern[str]", text: str) -> "regex.Match[str] | None":
        try:
            match = pattern.search(unicodedata.normalize("NFC", text), timeout=SEARCH_SECONDS)
        except (TimeoutError, MemoryError) as error:
            raise InputError(
                f"evaluate.judges.{self.name}.pattern: {pattern.pattern!r} needs more than {SEARCH_SECONDS:g} "
                f"seconds, or too much memory, on the text {text[:60]!r}; avoid repeats within repeats such as (a|a)+"
            ) from error
        return match if match and match[1] is not None else None

    def _is_right(self, output: str, target: str) -> bool:
        answer = self.answer(target)
        return answer is not None and self.answer(output) == answer


class SimilarityJudge(ScoreJudge):
    """Nearer to the target: the higher cosine between the embeddings of output and target, −1 to 1."""

    noise = NOISE
    metric = "cosine to target"
    """The score's, whatever the judge is called: an evaluation has one embedding model, and one such judge."""

    def __init__(self, name: str, encode: Encode, fingerprint: str):
        super().__init__(name, self.metric)
        self._encode = encode
        self._fingerprint = fingerprint

    def spec(self) -> Spec:
        """What decides its verdicts."""
        return {"judge": "similarity", "embedder": self._fingerprint, "rules": RULES}

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Cosine of each output to its target."""
        cosines = np.einsum("nd,nd->n", self._encode(outputs), self._encode([case.target for case in cases]))
        return [min(1.0, max(-1.0, float(cosine))) for cosine in cosines]


class LongerJudge(ScoreJudge):
    """The output with more characters, whatever is in it: what a judge must beat to say more than that."""

    def __init__(self, name: str):
        super().__init__(name, f"{name} characters")

    def spec(self) -> Spec:
        """What decides its verdicts."""
        return {"judge": "longer", "unit": "characters"}

    def scores(self, cases: Sequence[Case], outputs: Sequence[str]) -> list[float]:
        """Characters of each output: they need no tokenizer, of which systems may have several."""
        return [float(len(output)) for output in outputs]


def normalized(text: str) -> str:
    """Return the text in NFC, without differences of case and white space."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def _normalized_answer(text: str) -> str:
    """Return an answer as it is compared: a number in its shortest form, other text without a full stop at the end."""
    answer = normalized(text).removesuffix(".").rstrip()
    match = _NUMBER.fullmatch(answer)
    if match is None:
        return answer
    before, after, whole, fraction = (part or "" for part in match.groups())
    if not whole + fraction or (before and after):
        return answer
    value = (whole.replace(",", "") or "0") + fraction.rstrip("0").rstrip(".")
    return f"-{value}" if before + after in ("-", "−") and value != "0" else value
