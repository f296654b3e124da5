"""The judge `local`: the probability of the letter A, by a model that runs here."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from cpo_pipe.data import templates
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.eval.judges.base import AB, BA, NOISE, Pair, Verdict, higher, unparseable
from cpo_pipe.eval.judges.logprobs import Logprobs, Scored, summed
from cpo_pipe.eval.judges.query import Query
from cpo_pipe.pipeline.engines.base import open_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cpo_pipe.pipeline.engines.vllm import VllmEngine

log = logging.getLogger(__name__)

LETTERS = "A", "B"
SPACES = "", " "
"""What may stand before a letter."""
TOGETHER = 64
"""Verdicts of vLLM that are recorded at once."""


class LocalJudge:
    """P(A) = p(A) / (p(A) + p(B)) at the position after the query, p of a letter with and without a space before it.

    The query is a user's message where the model's tokenizer has a chat template, and else plain text. Control tokens
    in what is judged are broken by a space and thus text; those of the templates are meant. A query that is longer
    than the model's context is no verdict, and counts as a tie.
    """

    sees_order = True

    def __init__(
        self,
        name: str,
        model: Model,
        tokenizer: TokenizerFiles,
        query: Query,
        both_orders: bool,
        engine: str,
        logprobs: Logprobs,
        chat_date: str | None = None,
    ):
        """`tokenizer` is the model's own; `engine`, which decides no verdict, is `auto`, `vllm` or `transformers`."""
        self.name, self.query = name, query
        self.orders: Sequence[str] = (AB, BA) if both_orders else (AB,)
        self._model, self._tokenizer, self._engine, self._logprobs = model, tokenizer, engine, logprobs
        self._chat_date = chat_date

    def spec(self) -> Spec:
        """What decides its verdicts."""
        return {"judge": "local", "model": self._model.fingerprint, "tokenizer": self._tokenizer.fingerprint,
                "template": self.query.text, "special_tokens": "as text",
                **({"chat_date": self._chat_date} if self._chat_date else {})}  # fmt: skip

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """Verdicts; `raw` holds the log-prob of each letter, in nats, and the engine.

        Those of vLLM come as they are ready. Those of transformers come together: the log-probs that they are made of
        are kept as they are computed.

        Raises:
            InputError: the engine asked for will not do, or a letter cannot stand behind the query.
            RunError: a log-prob is not finite.
        """
        tokenizer, context = self._tokenizer.load(), self._model.context()
        broken = templates.breaker(tokenizer)
        asked, too_long = {}, []
        for place, pair in enumerate(pairs):
            case = replace(pair.case, prompt=broken(pair.case.prompt))
            query = self.query(Pair(case, broken(pair.output_a), broken(pair.output_b)))
            scored = self._encoded(case.example_id, query, tokenizer)
            longest = _length(scored)
            if context is not None and longest > context:
                too_long.append((place, unparseable("too long", detail=f"{longest} tokens, of {context}")))
            else:
                asked[place] = scored
        if too_long:
            yield too_long
        if asked:
            yield from self._answered(asked)

    def _encoded(self, example_id: str, query: str, tokenizer: "PreTrainedTokenizerBase") -> Scored:
        """Token ids of a query, and behind it those of the letters: first all variants of A, then as many of B.

        The letters are encoded together with the query: what a tokenizer makes of a space depends on what is before it.

        Raises:
            InputError: the tokenizer joins a letter, with and without a space, to the end of the query.
        """
        template = templates.CHAT if tokenizer.chat_template else templates.PLAIN
        text = templates.render(template, query, tokenizer=tokenizer, chat_date=self._chat_date)
        texts = [text, *(f"{text}{space}{letter}" for space in SPACES for letter in LETTERS)]
        prompt, *longer = templates.encode_prompts(template, texts, tokenizer)
        behind = [tuple(ids[len(prompt) :]) if ids[: len(prompt)] == prompt else () for ids in longer]
        # A variant counts for both letters or for none: else one of them would have more chances than the other.
        variants = dict.fromkeys(pair for pair in zip(behind[::2], behind[1::2], strict=True) if all(pair))
        if not variants:
            joined = next(letter for letter, *ids in zip(LETTERS, behind[:2], behind[2:], strict=True) if not all(ids))
            raise InputError(
                f"evaluate.judges.{self.name}.template: the tokenizer of {self._model.name} joins the letter {joined} "
                "to the end of the query: end the template otherwise, such as with a colon"
            )
        return Scored(example_id, prompt, [ids for letter in zip(*variants, strict=True) for ids in letter])

    def _answered(self, asked: Mapping[int, Scored]) -> Iterator[list[tuple[int, Verdict]]]:
        """Verdicts by the engine that is taken."""
        places, wanted = list(asked), list(asked.values())
        engine = self._vllm(wanted)
        if engine is None:
            description = f"transformers {version('transformers')}, float32"
            sums = summed(self._logprobs, self._model, wanted)
            yield [(place, _verdict(found, description)) for place, found in zip(places, sums, strict=True)]
            return
        prompts = [scored.prompt_ids for scored in wanted]
        letters = [[token for ids in scored.continuations for token in ids] for scored in wanted]
        came = []
        for number, found in engine.next_logprobs(prompts, letters):
            if not all(map(math.isfinite, found)):
                raise RunError(f"{self._model.name}: log-probs of the letters after a query are {found}")
            came.append((places[number], _verdict(found, engine.description)))
            if len(came) == TOGETHER:
                yield came
                came = []
        if came:
            yield came

    def _vllm(self, wanted: Sequence[Scored]) -> "VllmEngine | None":
        """The engine vllm, or None for transformers; where `auto` takes that, it says why.

        Raises:
            InputError: vllm is asked for, and will not do.
        """
        if self._engine == "transformers":
            return None
        if any(len(ids) > 1 for scored in wanted for ids in scored.continuations):
            why = (
                "engine is vllm, which gives log-probs of single tokens only, and a letter is several to the tokenizer "
                f"of {self._model.name}: use engine transformers"
            )
        else:
            try:
                engine = open_engine("vllm", self._model, max(map(_length, wanted)))
            except InputError as refusal:
                why = str(refusal)
            else:
                from cpo_pipe.pipeline.engines.vllm import VllmEngine

                assert isinstance(engine, VllmEngine)
                return engine
        if self._engine == "vllm":
            raise InputError(f"evaluate.judges.{self.name}.{why}")
        log.info("engine: transformers (judge %s: %s)", self.name, why)
        return None


def _length(scored: Scored) -> int:
    """Tokens of the query and the longest letter behind it."""
    return len(scored.prompt_ids) + max(map(len, scored.continuations))


def _verdict(logprobs: Sequence[float], engine: str) -> Verdict:
    """From the log-probs of all variants of A, then of as many of B."""
    log_a, log_b = (float(value) for value in np.logaddexp.reduce(np.reshape(logprobs, (2, -1)), axis=1))
    p_a = float(np.exp(log_a - np.logaddexp(log_a, log_b)))
    return Verdict(higher(p_a, 0.5, NOISE), p_a, {"A": log_a, "B": log_b, "engine": engine})
