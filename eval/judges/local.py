"""The judge `local`: the probability of the letter A, by a model that runs here."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpo_pipe.data import templates
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.eval.judges.base import AB, BA, NOISE, Pair, Verdict, higher, unparseable
from cpo_pipe.eval.judges.logprobs import Logprobs, Scored, summed
from cpo_pipe.eval.judges.query import Query

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = "A", "B"


class LocalJudge:
    """P(A) = p(A) / (p(A) + p(B)) at the position after the query, p of a letter with and without a space before it.

    The query is a user's message where the model's tokenizer has a chat template, and else plain text. One that is
    longer than the model's context is no verdict, and counts as a tie.
    """

    sees_order = True

    def __init__(
        self, name: str, model: Model, tokenizer: TokenizerFiles, query: Query, both_orders: bool, logprobs: Logprobs
    ):
        """`tokenizer` is the model's own."""
        self.name, self.query = name, query
        self.orders: Sequence[str] = (AB, BA) if both_orders else (AB,)
        self._model, self._tokenizer, self._logprobs = model, tokenizer, logprobs

    def spec(self) -> Spec:
        """What decides its verdicts."""
        return {"judge": "local", "model": self._model.fingerprint, "tokenizer": self._tokenizer.fingerprint,
                "template": self.query.text}  # fmt: skip

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """All verdicts together; `raw` holds the log-prob of each letter, in nats."""
        tokenizer, context = self._tokenizer.load(), self._model.context()
        wanted, letters, too_long = {}, {}, []
        for place, pair in enumerate(pairs):
            prompt_ids, letters[place] = self._encoded(self.query(pair), tokenizer)
            continuations = [ids for variants in letters[place] for ids in variants]
            longest = len(prompt_ids) + max(map(len, continuations))
            if context is not None and longest > context:
                too_long.append((place, unparseable("too long", detail=f"{longest} tokens, of {context}")))
            else:
                wanted[place] = Scored(pair.case.example_id, prompt_ids, continuations)
        sums = summed(self._logprobs, self._model, list(wanted.values()))
        yield too_long + [
            (place, _verdict(values[: len(letters[place][0])], values[len(letters[place][0]) :]))
            for place, values in zip(wanted, sums, strict=True)
        ]

    def _encoded(self, query: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[list[list[int]]]]:
        """Token ids of a query, and for each letter those of its variants behind it.

        The letters are encoded together with the query: what a tokenizer makes of a space depends on what is before it.

        Raises:
            InputError: the tokenizer joins a letter, with and without a space, to the end of the query.
        """
        template = templates.CHAT if tokenizer.chat_template else templates.PLAIN
        text = templates.render(template, query, tokenizer=tokenizer)
        texts = [text, *(f"{text}{space}{letter}" for letter in LETTERS for space in ("", " "))]
        prompt, *longer = templates.encode_prompts(template, texts, tokenizer)
        found = []
        for letter, encoded in zip(LETTERS, (longer[:2], longer[2:]), strict=True):
            behind = {tuple(ids[len(prompt) :]) for ids in encoded if ids[: len(prompt)] == prompt}
            if not behind - {()}:
                raise InputError(
                    f"evaluate.judges.{self.name}.template: the tokenizer of {self._model.name} joins the letter "
                    f"{letter} to the end of the query: end the template otherwise, such as with a colon"
                )
            found.append([list(ids) for ids in sorted(behind - {()})])
        return prompt, found


def _verdict(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """From the log-probs of each letter's variants."""
    log_a, log_b = float(np.logaddexp.reduce(a)), float(np.logaddexp.reduce(b))
    p_a = float(np.exp(log_a - np.logaddexp(log_a, log_b)))
    return Verdict(higher(p_a, 0.5, NOISE), p_a, {"A": log_a, "B": log_b})
