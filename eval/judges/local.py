"""The judge `local`: the probability that a local model answers A."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from cpo_pipe.data.config import Location
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import Executor
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.chat import ChatTemplate, Conversation
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.control_tokens import breaker
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, tokenizer_in
from cpo_pipe.data.store import Store
from cpo_pipe.eval.judges.base import (
    AB,
    BA,
    NOISE,
    Judge,
    JudgeConfig,
    JudgeDependencies,
    Pair,
    Verdict,
    higher,
    unparseable,
)
from cpo_pipe.eval.judges.logprobs import Continuations, continuation_logprobs
from cpo_pipe.eval.judges.query import BothOrders, Query, Template
from cpo_pipe.pipeline.engines.base import LogprobEngine
from cpo_pipe.pipeline.engines.registry import AUTO, ENGINES, EngineName, choose_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LETTERS = "A", "B"
SPACES = "", " "
"""What may precede a letter."""
TOGETHER = 64
"""Verdicts of an engine that are stored together."""
LOGPROB_ENGINES = [name for name in ENGINES if issubclass(ENGINES[name], LogprobEngine)]
SCORER = "transformers"
"""The engine whose log-probs come from the scorer (`trainer/scoring`), also for letters of several tokens."""


class Local(JudgeConfig):
    """Ask a local model which output is better, by its probabilities of the answers A and B."""

    model: Location = Field(
        description="the model: a training's name, a folder or a hub name, with a tokenizer of its own"
    )
    template: Template = "strict"
    both_orders: BothOrders = True
    engine: EngineName = AUTO

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: str) -> str:
        if engine not in (AUTO, SCORER) and not issubclass(ENGINES[engine], LogprobEngine):
            able = ", ".join([AUTO, *LOGPROB_ENGINES, SCORER])
            raise ValueError(f"{engine} gives no next-token log-probs (it is no LogprobEngine); choose from {able}")
        return engine

    def models(self) -> list[str]:
        """Return the model."""
        return [self.model]

    def open(self, name: str, dependencies: JudgeDependencies) -> "LocalJudge":
        """Return the judge."""
        model, store = dependencies.models[self.model], dependencies.store
        tokenizer, query = tokenizer_in(model.path, store), Query(self.template)
        executor, date = dependencies.executor, chat_date(tokenizer, store)
        return LocalJudge(name, model, tokenizer, query, self.both_orders, self.engine, store, executor, date)


class LocalJudge(Judge):
    """P(A) = p(A) / (p(A) + p(B)) at the position after the query, p of a letter with and without a space before it.

    The query is a user message if the model's tokenizer has a chat template, otherwise plain text. Control tokens in
    the judged texts are broken by a space and thus text; those of the templates are meant. A query longer than the
    model's context is unparseable and counts as a tie.
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
        store: Store,
        executor: Executor,
        chat_date: str | None = None,
    ):
        """`tokenizer` is the model's own; `engine` is an `EngineName` and decides no verdict."""
        super().__init__(name)
        self.query = query
        self.orders: Sequence[str] = (AB, BA) if both_orders else (AB,)
        self._model, self._tokenizer, self._engine = model, tokenizer, engine
        self._store, self._executor, self._chat_date = store, executor, chat_date

    def spec(self) -> Spec:
        """Return everything that decides a verdict."""
        return {"judge": "local", "model": self._model.fingerprint, "tokenizer": self._tokenizer.fingerprint,
                "template": self.query.text, "special_tokens": "as text",
                **({"chat_date": self._chat_date} if self._chat_date else {})}  # fmt: skip

    def judge(self, pairs: Sequence[Pair]) -> Iterator[list[tuple[int, Verdict]]]:
        """Yield verdicts; `raw` holds the log-probability of each letter, in nats, and the engine.

        An engine's verdicts are yielded as they are ready, those of transformers together: it caches the
        log-probabilities that they are computed from.

        Raises:
            InputError: the engine cannot be used, or a letter cannot follow the query.
            RunError: a log-probability is not finite.
        """
        tokenizer, context = self._tokenizer.load(), self._model.context()
        broken = breaker(tokenizer)
        chat = ChatTemplate(tokenizer, self._chat_date) if tokenizer.chat_template else None
        asked, too_long = {}, []
        for place, pair in enumerate(pairs):
            case = replace(pair.case, prompt=broken(pair.case.prompt))
            query = self.query(Pair(case, broken(pair.output_a), broken(pair.output_b)))
            scored = self._encoded(case.example_id, query, tokenizer, chat)
            longest = _length(scored)
            if context is not None and longest > context:
                too_long.append((place, unparseable("too long", detail=f"{longest} tokens, of {context}")))
            else:
                asked[place] = scored
        if too_long:
            yield too_long
        if asked:
            yield from self._answered(asked)

    def _encoded(
        self, example_id: str, query: str, tokenizer: "PreTrainedTokenizerBase", chat: ChatTemplate | None
    ) -> Continuations:
        """Return the token ids of a query and of the letters after it: first all variants of A, then as many of B.

        The letters are encoded together with the query: how a tokenizer encodes a space depends on what precedes it.

        Raises:
            InputError: the tokenizer merges a letter, with and without a space, into the end of the query.
        """
        template = templates.PLAIN if chat is None else templates.CHAT
        text = query if chat is None else chat.prompt(Conversation.of_text(query))
        texts = [text, *(f"{text}{space}{letter}" for space in SPACES for letter in LETTERS)]
        prompt, *longer = templates.encode_prompts(template, texts, tokenizer)
        behind = [tuple(ids[len(prompt) :]) if ids[: len(prompt)] == prompt else () for ids in longer]
        # A variant counts for both letters or for none: else one of them would have more chances than the other.
        variants = dict.fromkeys(pair for pair in zip(behind[::2], behind[1::2], strict=True) if all(pair))
        if not variants:
            joined = next(letter for letter, *ids in zip(LETTERS, behind[:2], behind[2:], strict=True) if not all(ids))
            raise InputError(
                f"evaluate.judges.{self.name}.template: the tokenizer of {self._model.name} joins the letter {joined} "
                "to the end of the query: end the template differently, for example with a colon"
            )
        return Continuations(example_id, prompt, [ids for letter in zip(*variants, strict=True) for ids in letter])

    def _answered(self, asked: Mapping[int, Continuations]) -> Iterator[list[tuple[int, Verdict]]]:
        """Yield the verdicts of the queries that fit the context."""
        places, queries = list(asked), list(asked.values())
        engine = self._open_engine(queries)
        if engine is None:
            description = f"transformers {version('transformers')}, float32"
            sums = continuation_logprobs(self._store, self._executor, self._model, queries)
            yield [(place, _verdict(logprobs, description)) for place, logprobs in zip(places, sums, strict=True)]
            return
        prompts = [query.prompt_ids for query in queries]
        letters = [[token for ids in query.token_ids for token in ids] for query in queries]
        verdicts = []
        for number, logprobs in engine.next_logprobs(prompts, letters):
            if not all(map(math.isfinite, logprobs)):
                raise RunError(f"{self._model.name}: log-probs of the letters after a query are {logprobs}")
            verdicts.append((places[number], _verdict(logprobs, engine.description)))
            if len(verdicts) == TOGETHER:
                yield verdicts
                verdicts = []
        if verdicts:
            yield verdicts

    def _open_engine(self, queries: Sequence[Continuations]) -> LogprobEngine | None:
        """Return the engine, or None for the scorer; `auto` takes the first that can be used, and logs its choice.

        Raises:
            InputError: the engine named cannot be used.
        """
        if self._engine == SCORER:
            return None
        reasons: list[str] = []
        for name in LOGPROB_ENGINES if self._engine == AUTO else [self._engine]:
            try:
                if any(len(ids) > 1 for query in queries for ids in query.token_ids):
                    raise InputError(
                        f"engine is {name}, which gives log-probs of single tokens only, and a letter is several to "
                        f"the tokenizer of {self._model.name}: use engine {SCORER}"
                    )
                engine = choose_engine(name, self._model)(self._model, max(map(_length, queries)))
            except InputError as refusal:
                if self._engine != AUTO:
                    raise InputError(f"evaluate.judges.{self.name}.{refusal}") from refusal
                reasons.append(str(refusal))
            else:
                assert isinstance(engine, LogprobEngine)
                log.info("engine: %s", name)
                return engine
        log.info("engine: %s (judge %s: %s)", SCORER, self.name, "; ".join(reasons))
        return None


def _length(scored: Continuations) -> int:
    """Return the number of tokens of the query and the longest letter after it."""
    return len(scored.prompt_ids) + max(map(len, scored.token_ids))


def _verdict(logprobs: Sequence[float], engine: str) -> Verdict:
    """Return the verdict of the log-probabilities of all variants of A, then of as many of B."""
    log_a, log_b = (float(value) for value in np.logaddexp.reduce(np.reshape(logprobs, (2, -1)), axis=1))
    p_a = float(np.exp(log_a - np.logaddexp(log_a, log_b)))
    return Verdict(higher(p_a, 0.5, NOISE), p_a, {"A": log_a, "B": log_b, "engine": engine})
