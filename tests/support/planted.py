"""Negatives of which some are correct, planted in the answers of arithmetic problems like GSM8K's."""

import re
from dataclasses import dataclass

_CALCULATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_SYNONYMS = {"she": "the woman", "he": "the man", "so": "hence", "makes": "gets", "total": "sum", "each": "every",
             "sells": "gives away for money", "buys": "purchases", "has": "owns", "needs": "requires", "is": "equals",
             "there": "here", "then": "after that", "the": "this", "cost": "price", "more": "further"}  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A negative whose correctness is known."""

    kind: str
    text: str
    correct: bool


def number_of(answer: str) -> float:
    return float(answer.rpartition("####")[2].replace(",", ""))


def plant(answer: str, other: str) -> list[Planted]:
    """Return four correct and four wrong negatives for a target that ends in `#### NUMBER`.

    `other` is the answer to another problem, with another number.
    """
    steps, _, written = answer.rpartition("\n#### ")
    value = number_of(answer)
    right, wrong = f"{value:,.2f}" if value % 1 else f"{value:,.0f}", f"{value + 3:,.2f}".removesuffix(".00")
    sums = "\n".join(f"{left} = {result}" for left, result in _CALCULATION.findall(steps)) or "Count them."
    spoken = _CALCULATION.sub("", steps)
    reworded = re.sub(r"[A-Za-z]+", lambda word: _SYNONYMS.get(word[0].lower(), word[0]), spoken)
    slipped = re.sub(rf"(?<![0-9.,]){re.escape(written)}(?![0-9])", wrong.replace(",", ""), spoken)
    return [
        Planted("reworded", f"{reworded}\n#### {right}", True),
        Planted("sums only", f"{sums}\nSo it is ${right}.\n#### ${right}.", True),
        Planted(
            "answer only", f"The answer is {right}.\n#### {right}.0" if "." not in right else f"#### {right}", True
        ),
        Planted("reworded, without ####", f"{reworded}\nThe answer is {right}.", True),
        Planted("slip at the end", f"{slipped}\n#### {wrong}", False),
        Planted("reworded, other number", f"{reworded}\n#### {wrong}", False),
        Planted("sums only, other number", f"{sums}\nSo it is ${wrong}.\n#### ${wrong}.", False),
        Planted("answer to another problem", other, False),
    ]
