"""Requests to an OpenAI-compatible server: retried, and many at a time."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models.chat import Message
from cpo_pipe.data.progress import LOG_SECONDS
from cpo_pipe.data.text import one_line
from cpo_pipe.pipeline.api.answers import (
    DETAIL,
    Answer,
    Failed,
    Refused,
    Retryable,
    ServerError,
    body_of,
    check_answer,
    title_of,
)
from cpo_pipe.pipeline.api.budget import Budget
from cpo_pipe.pipeline.api.limits import Pace
from cpo_pipe.pipeline.api.model import ApiModel, Tokens

if TYPE_CHECKING:
    from httpx2 import Response

log = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")

_ROUNDS, _SLOW_ROUNDS = 4, 20
"""How often in a row all requests under way may fail, or be told to slow down, before the server counts as down."""
_TOGETHER = 0.1
"""Seconds that an answer waits for others, so that they share a shard."""
_OVERHEAD = 256
"""Tokens that a server's chat template may add to a prompt."""
_AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
_FILTERED = ("content_filter", "content_policy_violation", "invalid_prompt")
"""Error codes of requests refused for their content."""
_TOO_LONG = re.compile(r"context (length|window)|maximum context|max_model_len|prompt is too long", re.IGNORECASE)

Question = str | Sequence[Message]
"""A user's message or a text to complete, or the messages of a conversation."""


class ApiClient:
    """Sends requests to one server: retries failures, pauses where the server asks for it, and obeys the caps.

    It belongs to the event loop that first uses it.
    """

    def __init__(self, api: ApiModel):
        """Prepare the client; it connects with the first request."""
        from openai import AsyncOpenAI

        self._api, self._config, self._ledger = api, api.config, api.ledger
        self._key = api.key()
        # No retries by the package: it does not recognize invalid answers, and its pauses apply to one request only.
        self._client = AsyncOpenAI(base_url=self._config.url, api_key=self._key or "none", max_retries=0, timeout=None)
        self._budget, self._pace = Budget(api), Pace(api.name)
        self._told_at = -math.inf
        self._names: dict[str, str] = {}

    async def say(self, question: Question, max_tokens: int, n: int = 1, **parameters: Any) -> Answer:
        """Return answers to a text (a user's message, or a text to complete, by the endpoint) or to messages.

        Args:
            question: the text, or messages, each with `role` and `content`; those that begin with a system message of
                their own do not get the recipe's.
            max_tokens: length limit of an answer, in tokens.
            n: number of answers.
            parameters: other parameters of the endpoint.

        Raises:
            Refused: the server will never answer this request.
            Failed: all attempts failed.
            InputError: the server rejects such requests, whatever their messages.
            RunError: a cap is reached, the account has no credit, or the server stopped answering.
        """
        if self._config.endpoint == "completions":
            assert isinstance(question, str)
            return await self.complete(question, max_tokens, n, **parameters)
        asked = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        system = self._config.system
        if system is not None and asked[0]["role"] != "system":
            asked = [{"role": "system", "content": system}, *asked]
        most = Tokens(_most_tokens("".join(message["content"] for message in asked)), n * max_tokens)
        body = {"messages": asked, "max_tokens": max_tokens, "n": n, **parameters}
        return await self._ask("/chat/completions", body, most)

    async def complete(self, prompt: str | Sequence[int], max_tokens: int, n: int = 1, **parameters: Any) -> Answer:
        """Return continuations of a text, or of token ids where the server takes them; otherwise like `say`."""
        most = Tokens(_most_tokens(prompt) if isinstance(prompt, str) else len(prompt), n * max_tokens)
        body = {"prompt": prompt, "max_tokens": max_tokens, "n": n, **parameters}
        return await self._ask("/completions", body, most)

    def halt(self) -> None:
        """Stop sending requests; those under way may still be answered."""
        self._pace.halt()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _ask(self, path: str, body: Mapping[str, Any], most: Tokens) -> Answer:
        """Attempt a request until it succeeds; `most` is the most that one attempt may use."""
        try:
            return await self._pace.retry(lambda: self._attempt(path, body, most), self._config.attempts)
        except Retryable as error:
            self._ledger.failed += 1
            self._ledger.last_failure = str(error)
            raise Failed(str(error)) from None

    async def _attempt(self, path: str, body: Mapping[str, Any], most: Tokens) -> Answer:
        ledger, used = self._ledger, Tokens()
        await self._budget.reserve(most)
        try:
            await self._pace.turn()
            answer = await self._exchange(path, body)
            # Where the server does not report usage, count the most that it may be, so that the caps hold.
            error = answer.error
            used = answer.used or (Tokens() if error is not None and not answer.choices else most)
            if error is not None:
                raise self._verdict(error)
            check_answer(answer, body["n"])
        except Refused:
            ledger.in_vain = 0
            raise
        except Retryable as trouble:
            rounds = max(self._config.attempts, _ROUNDS) if trouble.counts else _SLOW_ROUNDS
            ledger.in_vain += 1 / (rounds * self._config.concurrency)
            if ledger.in_vain >= 1:
                raise RunError(
                    f"apis.{self._api.name}: the server stopped answering (last error: {trouble}); completed work "
                    "is kept; fix the cause and run the same command again"
                ) from None
            if time.monotonic() >= self._told_at + LOG_SECONDS:
                self._told_at = time.monotonic()
                log.info("apis.%s: %s; retrying%s", self._api.name, trouble, "" if trouble.counts else ", slower")
            raise
        finally:
            await self._budget.settle(most, used)
        ledger.in_vain = 0
        ledger.samples += sum(choice.refusal is None for choice in answer.choices)
        return answer

    async def _exchange(self, path: str, body: Mapping[str, Any]) -> Answer:
        from httpx2 import Response
        from openai import APIConnectionError, APIStatusError

        while True:
            sent = self._as_taken(body)
            try:
                async with asyncio.timeout(self._config.timeout):
                    response = await self._client.post(path, cast_to=Response, body=sent)
            # Errors are not chained: a server's message may repeat the key.
            except TimeoutError:
                raise Retryable(f"no answer within {self._config.timeout:g} s") from None
            except APIConnectionError as error:
                raise Retryable(f"no connection: {self._clean(str(error.__cause__ or error))}") from None
            except APIStatusError as raised:
                response = raised.response
                refusal = ServerError.read(body_of(response), raised.status_code, title_of(response))
                if self._adapts(refusal, sent):
                    continue
                self._pace.heed(response.headers)
                raise self._verdict(refusal) from None
            self._pace.heed(response.headers)
            answer = self._read(response)
            if answer.error is None or not self._adapts(answer.error, sent):
                return answer

    def _read(self, response: "Response") -> Answer:
        """Return the answer in a response of status 200.

        Raises:
            Retryable: the response is not a valid answer.
        """
        try:
            return Answer.model_validate_json(response.content)
        except ValidationError as invalid:
            fault = invalid.errors()[0]
        if fault["type"] == "json_invalid":
            start = self._clean(title_of(response)) or "nothing"
            raise Retryable(f"the answer is not JSON but {start}")
        place = ".".join(map(str, fault["loc"]))
        raise Retryable(f"unexpected form of the answer: {place}{': ' if place else ''}{fault['msg']}")

    # ── parameters and errors of the server ──────────────────────────────────────────────────────────────────────

    def _as_taken(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request with the server's names of the parameters, and without those that it does not know."""
        sent = {self._names.get(name, name): value for name, value in body.items()} | {"model": self._config.model}
        if sent["n"] == 1:  # the default; some servers accept no n
            del sent["n"]
        sent.pop("", None)
        return sent

    def _adapts(self, error: ServerError, sent: Mapping[str, Any]) -> bool:
        """Learn from an error that the server lacks a parameter; return whether the request is worth sending again."""
        text = error.text
        if error.status not in (400, 422) or self._config.server == "vllm":
            return False
        if "max_tokens" in sent and "max_completion_tokens" in text:  # OpenAI's own, for its newer models
            self._names["max_tokens"] = "max_completion_tokens"
            return True
        if "seed" in sent and re.search(r"""["']seed\\?["']""", text):
            log.info("apis.%s: the server takes no seed", self._api.name)
            self._names["seed"] = ""
            return True
        return False

    def _verdict(self, error: ServerError) -> Exception:
        """Return the exception to raise for an error."""
        status, config, api = error.status, self._config, f"apis.{self._api.name}"
        where, text = self._clean(error.where), self._clean(error.message)
        self._pace.heed(error.headers)
        if error.code in _FILTERED:
            return Refused("content filter", text)
        if status in (None, 400, 413, 422) and (error.code == "context_length_exceeded" or _TOO_LONG.search(text)):
            return Refused("too long", text)
        if status == 402 or error.code == "insufficient_quota":
            return RunError(f"{api}: the account has no credit left ({text}); completed work is kept; add credit and "
                            "run the same command again")  # fmt: skip
        if status is None or status in _AGAIN or status >= 500:
            return Retryable(f"{where}: {text}", counts=status != 429)
        if status == 401 and self._key is None:
            return InputError(f"{api}.key: the server requires a key, but the environment variable {config.key} is "
                              "not set; export it")  # fmt: skip
        if status == 401:
            return InputError(f"{api}.key: the server does not accept the key in {config.key}; export a valid one")
        if status == 404:
            return InputError(f"{api}: no model {config.model} at {config.url} ({text}); correct model or url, which "
                              "often ends in /v1")  # fmt: skip
        return InputError(f"{api}: the server rejects the request ({where}: {text}); change the setting that it names")

    def _clean(self, text: str) -> str:
        """Return a server's text for messages: one line, shortened, and without the key."""
        return one_line(text.replace(self._key, "…") if self._key else text, DETAIL)


def _most_tokens(text: str) -> int:
    """Return the most tokens that a text can have with any tokenizer: one for each byte, and those of a template."""
    return len(text.encode()) + _OVERHEAD


def ask_all(
    api: ApiModel, items: Iterable[Item], ask: Callable[[ApiClient, Item], Coroutine[Any, Any, T]]
) -> Iterator[list[T]]:
    """Yield the results of `ask` for the items, `concurrency` of them at a time, in lists of results that are ready.

    When an item raises, no more requests are sent; the results of those under way are yielded before the exception is
    raised. When the iterator is closed or interrupted, results that are ready are yielded and the rest are cancelled.
    However it ends, the command's usage of the API so far is logged.

    Raises:
        InputError: as `ApiModel.check_client`.
    """
    api.check_client()
    waiting, most = iter(items), api.config.concurrency
    under_way: set[asyncio.Task[None]] = set()
    ready: list[T] = []
    errors: list[BaseException] = []

    async def keep(item: Item) -> None:
        result = await ask(client, item)
        ready.append(result)

    async def go_on() -> bool:
        """Work until some results are ready; return whether more will follow."""
        nonlocal under_way
        end: float | None = None
        while True:
            if not errors:
                under_way |= {asyncio.create_task(keep(item)) for item in islice(waiting, most - len(under_way))}
            if ready and end is None:
                end = time.monotonic() + _TOGETHER
            if not under_way or len(ready) >= most or (end is not None and time.monotonic() >= end):
                return bool(under_way)
            wait = None if end is None else end - time.monotonic()
            done, under_way = await asyncio.wait(under_way, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            errors.extend(error for task in done if (error := task.exception()) is not None)
            if errors:
                client.halt()

    with asyncio.Runner() as runner:
        client = ApiClient(api)
        try:
            more = True
            while more:
                try:
                    more = runner.run(go_on())
                finally:  # interrupted, too
                    if ready:
                        results, ready = ready, []
                        yield results
            if errors:
                raise errors[0]
        finally:
            for task in under_way:
                task.cancel()
            runner.run(_end(under_way, client))
            log.info("apis.%s: %s by this command so far", api.name, api.spent())


async def _end(under_way: Iterable[asyncio.Task[Any]], client: ApiClient) -> None:
    await asyncio.gather(*under_way, return_exceptions=True)
    await client.close()
