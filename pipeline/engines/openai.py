"""Sampling from a model behind an OpenAI-compatible server.

`ApiModel` is the model as a recipe names it, `ApiClient` talks to its server, `answers` keeps many requests under way,
and `Asked` is the work that turns answers into rows.
"""

import asyncio
import importlib.util
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cpo_pipe.data.end_tokens import without_end
from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.executor import Made, Make
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.data.models import TokenizerFiles
from cpo_pipe.data.progress import LOG_SECONDS
from cpo_pipe.data.recipe import Api
from cpo_pipe.data.store import Rows
from cpo_pipe.data.templates import encode_targets, eos_token_id, finder, special_tokens, without_eos
from cpo_pipe.data.text import one_line
from cpo_pipe.pipeline.engines.base import Request, Sampling, requests
from cpo_pipe.pipeline.missing import refused_source

if TYPE_CHECKING:
    from httpx2 import Response
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")

_BACKOFF = 2.0
"""Seconds within which a request that failed once is sent again; doubled with each failure."""
_LONGEST_BACKOFF = 60.0
_ROUNDS, _SLOW_ROUNDS = 4, 20
"""Times that all requests under way may fail, or be told to slow down, in a row before the server counts as down."""
_TOGETHER = 0.1
"""Seconds for which an answer waits for others to be recorded with it: a shard for each would be too many."""
_OVERHEAD = 256
"""Tokens that a server's chat template may add to a prompt."""
_WORTH_SAYING = 5.0
"""Seconds of waiting that the user is told about."""
_DETAIL = 200
"""Characters of a server's message that are shown or kept."""

_AGAIN = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""
_FILTERED = ("content_filter", "content_policy_violation", "invalid_prompt")
"""Codes of a request that was refused for what it says."""
_LIMITS = ("length", "max_tokens", "model_length", "model_context_window_exceeded", "repetition")
"""Values of `finish_reason` where a limit (of tokens, or of repeated ones) cut the text."""
_FILTERS = ("content_filter", "refusal", "safety", "recitation", "sensitive")
"""Values of `finish_reason` where the server withholds the text."""
_FAILURES = ("error", "abort", "aborted", "cancelled", "network_error", "insufficient_system_resource")
"""Values of `finish_reason` where the server failed in the middle of the text. Any other value is a normal end."""
_STATUSES = {
    "invalid_request_error": 400, "authentication_error": 401, "invalid_api_key": 401, "insufficient_quota": 402,
    "permission_error": 403, "model_not_found": 404, "not_found_error": 404, "rate_limit_error": 429,
    "rate_limit_exceeded": 429, "too_many_requests": 429, "resource_exhausted": 429, "server_error": 500,
    "overloaded_error": 503,
}  # fmt: skip
"""HTTP statuses of the named errors that servers put into an answer of status 200."""
_TOO_LONG = re.compile(r"context (length|window)|maximum context|max_model_len|prompt is too long", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


# ── what a command knows of a model ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Tokens:
    """Of prompts, and written."""

    prompt: int = 0
    written: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.written + other.written)

    def __sub__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt - other.prompt, self.written - other.written)


@dataclass
class Ledger:
    """What a command has had from an API so far."""

    used: Tokens = field(default_factory=Tokens)
    samples: int = 0
    failed: int = 0
    """Requests that got no answer however often they were sent."""
    last_failure: str = ""
    in_vain: float = 0.0
    """Requests sent since the last answer, each as its share of those that may be sent in vain."""
    unused_top_k: set[int] = field(default_factory=set)
    """Those that the user was told about."""


@dataclass(frozen=True)
class ApiModel:
    """A model behind a server; made once by a command for each API that it uses, so that caps hold for all it does."""

    name: str
    """As the recipe calls it; for messages only."""
    config: Api
    ledger: Ledger = field(default_factory=Ledger, compare=False, repr=False)

    def spec(self) -> Spec:
        """What identifies its distribution, as far as one can know it."""
        config = self.config
        return {
            "url": config.url.rstrip("/"),
            "model": config.model,
            "revision": config.revision,
            "server": config.server,
            "endpoint": config.endpoint,
            "system": config.system,
        }

    @property
    def fingerprint(self) -> str:
        """Hash of what identifies it."""
        return digest(self.spec())

    def obeyed(self, sampling: Sampling) -> Sampling:
        """The part of a sampling that the server is asked for, which is what identifies samples.

        Only vLLM takes top-k. Ends are not asked for by id: the tokenizer's EOS always is one, and the others are the
        model's own.

        Raises:
            InputError: it is beam search, which servers do not have.
        """
        if sampling.beams > 1:
            raise InputError(
                f"apis.{self.name}: beams is {sampling.beams}, but an API has no beam search: leave it out of the "
                "comparison, or take other decodings"
            )
        return replace(sampling, top_k=sampling.top_k if self.config.server == "vllm" else 0, stop_ids=())

    def key(self) -> str | None:
        """The key in the environment, or None: a server of one's own wants none.

        Raises:
            InputError: the recipe names a variable that is not set, or what is in it cannot be a key.
        """
        variable, named = self.config.key, "key" in self.config.model_fields_set
        key = os.environ.get(variable, "").strip()
        if named and not key:
            raise InputError(f"apis.{self.name}.key: the environment variable {variable} is not set: export it")
        if not re.fullmatch(r"[!-~]*", key):  # it could not be sent, and the complaint would show it
            raise InputError(
                f"apis.{self.name}.key: the environment variable {variable} holds spaces, line breaks or characters "
                "beyond ASCII, as no key does: export it again"
            )
        return key or None

    def check_client(self) -> None:
        """Look for what asking takes, before anything is asked.

        Raises:
            InputError: the extra `openai` is not installed, or the key that the recipe names is not there.
        """
        if not all(map(importlib.util.find_spec, ("openai", "tenacity"))):
            raise InputError(f"apis.{self.name}: its client is not installed: pip install 'cpo-pipe[openai]'")
        self.key()

    def check_answered(self) -> None:
        """Say what is still missing after the work.

        Raises:
            RunError: requests got no answer, however often they were sent; the others went on.
        """
        ledger = self.ledger
        if ledger.failed:
            raise RunError(
                f"apis.{self.name}: {ledger.failed:,} requests got no answer, each sent {self.config.attempts} times "
                f"or more (the last: {ledger.last_failure}); what was made is kept: run the same command again"
            )

    def neutral(self) -> dict[str, Any]:
        """Defaults that are to be named: vLLM's server would put those of its model's generation config there."""
        return {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} if self.config.server == "vllm" else {}

    def price(self, tokens: Tokens) -> float | None:
        """US dollars for so many tokens; None where the recipe names no prices."""
        config = self.config
        if config.input_price is None or config.output_price is None:
            return None
        return (tokens.prompt * config.input_price + tokens.written * config.output_price) / 1e6

    def cap_below(self, tokens: Tokens) -> str | None:
        """The cap that so many tokens would break, as the recipe calls it; None if none."""
        price = self.price(tokens)
        if self.config.max_usd is not None and price is not None and price > self.config.max_usd:
            return "max_usd"
        if self.config.max_tokens is not None and tokens.prompt + tokens.written > self.config.max_tokens:
            return "max_tokens"
        return None

    def spent(self) -> str:
        """What the command has used, for people."""
        used = self.ledger.used
        price = self.price(used)
        dollars = f", {price:.4g} US dollars" if price is not None else ""
        return f"{used.prompt:,} prompt tokens and {used.written:,} written{dollars}"


# ── what a server says ───────────────────────────────────────────────────────────────────────────────────────────


class _Part(BaseModel):
    """A part of a message's content, where a server gives it as a list."""

    type: str = "text"
    text: str | None = None


class _Message(BaseModel):
    content: str | list[_Part] | None = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None

    @property
    def text(self) -> str | None:
        """The text, without reasoning."""
        if not isinstance(self.content, list):
            return self.content
        texts = [part.text for part in self.content if part.type == "text" and part.text is not None]
        return "".join(texts) if texts else None

    @property
    def reasoned(self) -> bool:
        """Whether the model wrote reasoning that the server keeps apart from the text."""
        parts = self.content if isinstance(self.content, list) else []
        return bool(self.reasoning_content or self.reasoning or any(part.type != "text" for part in parts))


class Choice(BaseModel):
    """One of the texts in an answer."""

    index: int | None = None
    finish_reason: str | None = None
    text: str | None = None
    """Of a completion."""
    message: _Message | None = None
    """Of a chat."""
    token_ids: list[int] | None = None
    """Where vLLM was asked for them."""
    logprobs: Any = None
    error: Any = None
    """Of a text that the server began and could not finish."""

    @property
    def written(self) -> str | None:
        """The text."""
        return self.message.text if self.message is not None else self.text

    @property
    def _end(self) -> str:
        return (self.finish_reason or "").lower()

    @property
    def cut(self) -> bool:
        """Whether a limit of tokens cut the text; any other text ended by itself."""
        return self._end in _LIMITS

    @property
    def failed(self) -> bool:
        """Whether the server failed in the middle of the text."""
        return self._end in _FAILURES

    @property
    def reasoned(self) -> bool:
        """Whether there is reasoning beside the text."""
        return self.message is not None and self.message.reasoned

    @property
    def refusal(self) -> "Refused | None":
        """Why there is no text, where asking again would not help."""
        if self._end in _FILTERS:
            return Refused("content filter", self.written or "")
        if self.message is not None and self.message.refusal:
            return Refused("refusal", self.message.refusal)
        if self.written is None and self.reasoned and not self.cut:
            return Refused("empty", "the answer has reasoning, but no text after it")
        return None


class Answer(BaseModel):
    """What a server answers to one request; other fields are ignored."""

    choices: list[Choice] = []
    usage: Any = None
    model: str | None = None
    system_fingerprint: str | None = None
    model_config = ConfigDict(extra="allow")  # an error may be in any field

    @field_validator("choices", mode="before")
    @classmethod
    def _null_is_none(cls, choices: Any) -> Any:
        return [] if choices is None else choices

    @property
    def used(self) -> Tokens | None:
        """The tokens it took, where the server says so."""
        usage = self.usage if isinstance(self.usage, dict) else {}
        prompt, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return Tokens(prompt, written) if isinstance(prompt, int) and isinstance(written, int) else None

    @property
    def error(self) -> "ServerError | None":
        """The error that it reports although its HTTP status is 200."""
        body = self.model_extra or {}
        begun = next((choice.error for choice in self.choices if choice.error), None)
        if begun or body.get("error"):
            return ServerError.read({"error": begun} if begun else body)
        if not self.choices and any(body.get(name) for name in _MESSAGES):
            return ServerError.read(body)
        return None


@dataclass(frozen=True)
class ServerError:
    """An error as a server reports it."""

    status: int | None
    """HTTP status, or the one in the body of an answer of status 200; None where neither says one."""
    code: str
    message: str
    text: str
    """The body."""
    where: str = "error"
    """What a message calls it."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of the server behind this one."""

    @classmethod
    def read(cls, body: Any, status: int | None = None, text: str = "") -> "ServerError":
        """Return the error in a JSON body.

        Args:
            body: what the server sent; any JSON value.
            status: the HTTP status, where that is an error.
            text: the body as text, which is shown where it has no message.
        """
        body = body[0] if isinstance(body, list) and body else body  # Google puts it into a list
        around = body if isinstance(body, dict) else {}
        said = around.get("error")
        fields = around | (said if isinstance(said, dict) else {"message": said} if said else {})
        codes = [value for name in ("code", "status", "status_code", "type") if isinstance(value := fields.get(name),
                 str | int)]  # fmt: skip
        metadata = fields["metadata"] if isinstance(fields.get("metadata"), dict) else {}
        headers = metadata["headers"] if isinstance(metadata.get("headers"), dict) else {}
        # What a server in between says, and then the one behind it, which knows the reason.
        messages = [next((fields[name] for name in _MESSAGES if fields.get(name)), None), metadata.get("raw")]
        text = text or json.dumps(body)
        found = next((code for code in map(_status, codes) if code is not None), None)
        return cls(
            status=found if status is None else status,
            code=str(fields.get("code") or fields.get("type") or ""),
            message=": ".join(message for message in messages if isinstance(message, str) and message) or text,
            text=text,
            where=f"HTTP {status}" if status is not None else f"error {codes[0]}" if codes else "error",
            headers={str(name).lower(): str(value) for name, value in headers.items()},
        )


_MESSAGES = ("message", "detail", "msg", "error_msg")
"""Fields in which servers put the message of an error."""


def _status(code: str | int) -> int | None:
    """Return the HTTP status that a code in a body is, or stands for."""
    return int(code) if re.fullmatch("[45][0-9]{2}", str(code)) else _STATUSES.get(str(code).lower())


class Refused(Exception):
    """The server will not answer this request, now or later."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:_DETAIL]


class Failed(Exception):
    """A request got no answer, however often it was sent."""


class _Again(Exception):
    """A request got no answer; another attempt may. Being told to slow down is not counted among its attempts."""

    def __init__(self, reason: str, *, counts: bool = True):
        super().__init__(reason)
        self.counts = counts


class ApiClient:
    """Asks one server: again where that helps, slower where it says so, and never beyond the caps.

    It belongs to the event loop that it is first used in.
    """

    def __init__(self, api: ApiModel):
        """Connects only when something is asked."""
        from openai import AsyncOpenAI

        self._api, self._config, self._ledger = api, api.config, api.ledger
        self._key = api.key()
        # The package's own retries see neither an answer that is none nor a pause that is meant for all requests.
        self._client = AsyncOpenAI(base_url=self._config.url, api_key=self._key or "none", max_retries=0, timeout=None)
        self._reserved = Tokens()
        self._settled = asyncio.Condition()
        self._halted = asyncio.Event()
        self._resume_at = 0.0
        self._told_at = -math.inf
        self._names: dict[str, str] = {}

    async def chat(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int, n: int = 1, **parameters: Any
    ) -> Answer:
        """Answers to a conversation.

        Args:
            messages: each with `role` and `content`.
            max_tokens: the longest answer.
            n: how many.
            parameters: others that the endpoint takes.

        Raises:
            Refused: the server will never answer this.
            Failed: it did not, however often it was asked.
            InputError: it answers no such request, whatever the messages.
            RunError: a cap is reached, or the server stopped answering.
        """
        most = Tokens(_most_tokens("".join(message["content"] for message in messages)), n * max_tokens)
        body = {"messages": messages, "max_tokens": max_tokens, "n": n, **parameters}
        return await self._ask("/chat/completions", body, most)

    async def complete(self, prompt: str | Sequence[int], max_tokens: int, n: int = 1, **parameters: Any) -> Answer:
        """Continuations of a text, or of token ids where the server takes them; all else as in `chat`."""
        most = Tokens(_most_tokens(prompt) if isinstance(prompt, str) else len(prompt), n * max_tokens)
        body = {"prompt": prompt, "max_tokens": max_tokens, "n": n, **parameters}
        return await self._ask("/completions", body, most)

    async def say(self, text: str, max_tokens: int, n: int = 1, **parameters: Any) -> Answer:
        """Answers to a text: the message of a user, or what is to be completed, by the endpoint; all else as above."""
        if self._config.endpoint == "completions":
            return await self.complete(text, max_tokens, n, **parameters)
        system = self._config.system
        messages = [{"role": "system", "content": system}] if system is not None else []
        return await self.chat([*messages, {"role": "user", "content": text}], max_tokens, n, **parameters)

    def halt(self) -> None:
        """Send nothing more; what is under way may still be answered."""
        self._halted.set()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _ask(self, path: str, body: Mapping[str, Any], most: Tokens) -> Answer:
        """Attempt after attempt; `most` is what one may use."""
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

        failures = 0

        def enough(state: RetryCallState) -> bool:
            nonlocal failures
            error = state.outcome.exception() if state.outcome is not None else None
            failures += isinstance(error, _Again) and error.counts
            return failures >= self._config.attempts

        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_Again),
            wait=wait_random_exponential(multiplier=_BACKOFF, max=_LONGEST_BACKOFF),
            stop=enough,
            sleep=self._rest,
            reraise=True,
        )
        try:
            return await attempts(self._attempt, path, body, most)
        except _Again as error:
            self._ledger.failed += 1
            self._ledger.last_failure = str(error)
            raise Failed(str(error)) from None

    async def _attempt(self, path: str, body: Mapping[str, Any], most: Tokens) -> Answer:
        ledger, used = self._ledger, Tokens()
        await self._reserve(most)
        try:
            await self._turn()
            answer = await self._exchange(path, body)
            # Of a server that does not say what was used the most is counted, so that the caps hold.
            error = answer.error
            used = answer.used or (Tokens() if error is not None and not answer.choices else most)
            if error is not None:
                raise self._verdict(error)
            _check(answer, body["n"])
        except Refused:
            ledger.in_vain = 0
            raise
        except _Again as trouble:
            rounds = max(self._config.attempts, _ROUNDS) if trouble.counts else _SLOW_ROUNDS
            ledger.in_vain += 1 / (rounds * self._config.concurrency)
            if ledger.in_vain >= 1:
                raise RunError(
                    f"apis.{self._api.name}: the server stopped answering (last error: {trouble}); what was made "
                    "is kept; fix the cause and run the same command again"
                ) from None
            if time.monotonic() >= self._told_at + LOG_SECONDS:
                self._told_at = time.monotonic()
                log.info("apis.%s: %s; asking again%s", self._api.name, trouble, "" if trouble.counts else ", slower")
            raise
        finally:
            await self._settle(most, used)
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
            # None of these is chained: what a server says may repeat the key.
            except TimeoutError:
                raise _Again(f"no answer within {self._config.timeout:g} s") from None
            except APIConnectionError as error:
                raise _Again(f"no connection: {self._clean(str(error.__cause__ or error))}") from None
            except APIStatusError as raised:
                response = raised.response
                refusal = ServerError.read(_json(response), raised.status_code, _title(response))
                if self._adapts(refusal, sent):
                    continue
                self._heed(response.headers)
                raise self._verdict(refusal) from None
            self._heed(response.headers)
            answer = self._read(response)
            if answer.error is None or not self._adapts(answer.error, sent):
                return answer

    def _read(self, response: "Response") -> Answer:
        """Return the answer in a response of status 200.

        Raises:
            _Again: there is none.
        """
        try:
            return Answer.model_validate_json(response.content)
        except ValidationError as invalid:
            fault = invalid.errors()[0]
        if fault["type"] == "json_invalid":
            said = self._clean(_title(response)) or "nothing"
            raise _Again(f"the answer is not JSON but {said}")
        place = ".".join(map(str, fault["loc"]))
        raise _Again(f"unexpected form of the answer: {place}{': ' if place else ''}{fault['msg']}")

    # ── what the server takes ────────────────────────────────────────────────────────────────────────────────────

    def _as_taken(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request under the names that the server knows, without the parameters that it does not."""
        sent = {self._names.get(name, name): value for name, value in body.items()} | {"model": self._config.model}
        if sent["n"] == 1:  # the default everywhere; some servers know no other
            del sent["n"]
        sent.pop("", None)
        return sent

    def _adapts(self, error: ServerError, sent: Mapping[str, Any]) -> bool:
        """Whether a request was refused for a parameter of which the client now knows that the server has no such."""
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
        """What an error means."""
        status, config, api = error.status, self._config, f"apis.{self._api.name}"
        where, text = self._clean(error.where), self._clean(error.message)
        self._heed(error.headers)
        if error.code in _FILTERED:
            return Refused("content filter", text)
        if status in (None, 400, 413, 422) and (error.code == "context_length_exceeded" or _TOO_LONG.search(text)):
            return Refused("too long", text)
        if status == 402 or error.code == "insufficient_quota":
            return RunError(f"{api}: the account has no credit left ({text}); what was made is kept: add some and run "
                            "the same command again")  # fmt: skip
        if status is None or status in _AGAIN or status >= 500:
            return _Again(f"{where}: {text}", counts=status != 429)
        if status == 401 and self._key is None:
            return InputError(f"{api}.key: the server wants a key, and the environment variable {config.key} is not "
                              "set: export it")  # fmt: skip
        if status == 401:
            return InputError(f"{api}.key: the server does not accept the key in {config.key}: export a valid one")
        if status == 404:
            return InputError(f"{api}: there is no model {config.model} at {config.url} ({text}): correct model, or "
                              "url, which often ends in /v1")  # fmt: skip
        return InputError(f"{api}: the server refuses the request ({where}: {text}): change what it names")

    def _clean(self, text: str) -> str:
        """A server's text for people: one line, cut, and without the key, should it repeat that."""
        return one_line(text.replace(self._key, "…") if self._key else text, _DETAIL)

    # ── how fast, and how much ───────────────────────────────────────────────────────────────────────────────────

    def _heed(self, headers: Mapping[str, str]) -> None:
        """Remember when the server wants the next request, from whichever task it comes."""
        wait = _pause(headers)
        if wait >= _WORTH_SAYING and time.monotonic() + wait > self._resume_at + _WORTH_SAYING:
            log.info("apis.%s: the server wants no request for %.0f s", self._api.name, wait)
        self._resume_at = max(self._resume_at, time.monotonic() + wait)

    async def _turn(self) -> None:
        """Wait until the server wants requests again."""
        while (wait := self._resume_at - time.monotonic()) > 0 and not self._halted.is_set():
            await self._rest(wait + random.uniform(0, _BACKOFF))  # not all at the same moment
        if self._halted.is_set():
            raise Failed("not sent any more")

    async def _rest(self, seconds: float) -> None:
        """Sleep, but not on when nothing is to be sent any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._halted.wait()

    async def _reserve(self, most: Tokens) -> None:
        """Wait until so many tokens are below the caps whatever the requests under way will use."""

        def broken() -> str | None:
            return self._api.cap_below(self._ledger.used + self._reserved + most)

        async with self._settled:
            await self._settled.wait_for(lambda: not broken() or self._reserved == Tokens())
            if cap := broken():
                raise RunError(self._at_cap(cap))
            self._reserved += most

    async def _settle(self, most: Tokens, used: Tokens) -> None:
        async with self._settled:
            self._reserved -= most
            self._ledger.used += used
            self._settled.notify_all()

    def _at_cap(self, cap: str) -> str:
        ledger, api = self._ledger, f"apis.{self._api.name}"
        if cap == "max_usd":
            limit, spent = f"{self._config.max_usd:g} US dollars", f"{self._api.price(ledger.used):.4g}"
        else:
            limit, spent = f"{self._config.max_tokens:,} tokens", f"{ledger.used.prompt + ledger.used.written:,}"
        return (
            f"{api}: the cap of {limit} is reached ({spent} spent, {ledger.samples:,} samples made); what was made is "
            f"kept: raise {api}.{cap} and run the same command again"
        )


def _check(answer: Answer, n: int) -> None:
    """Refuse an answer that is none, in which case another one may be."""
    answer.choices.sort(key=lambda choice: choice.index or 0)
    if len(answer.choices) != n:
        raise _Again(f"the answer has {len(answer.choices)} choices, not {n}")
    for choice in answer.choices:
        ended = f"finish_reason {one_line(str(choice.finish_reason), _DETAIL)}"
        if choice.failed:
            raise _Again(f"the server failed in the middle of a text ({ended})")
        if choice.refusal is None and choice.written is None and not choice.cut:  # a limit may come before any text
            raise _Again(f"a choice without text ({ended})")


def _json(response: "Response") -> Any:
    """Return the JSON in a response; None where there is none."""
    try:
        return response.json()
    except ValueError:
        return None


def _title(response: "Response") -> str:
    """Return the text of a response; of a web page, as proxies send, its title."""
    title = re.search(r"<title[^>]*>(.*?)</title>", response.text, re.IGNORECASE | re.DOTALL)
    return title[1] if title else response.text or response.reason_phrase


def _most_tokens(text: str) -> int:
    """The most tokens that a text can be to a server whose tokenizer is not known: one for each byte."""
    return len(text.encode()) + _OVERHEAD


def _pause(headers: Mapping[str, str]) -> float:
    """Seconds for which a server wants no request, by the headers of its answer."""
    waits = [0.0]
    with suppress(ValueError):
        waits.append(float(headers.get("retry-after-ms", "")) / 1000)
    after = headers.get("retry-after", "")
    try:
        waits.append(float(after))
    except ValueError:
        with suppress(ValueError):
            waits.append(parsedate_to_datetime(after).timestamp() - time.time())
    for what in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{what}") == "0":
            parts = _DURATION.findall(headers.get(f"x-ratelimit-reset-{what}", ""))
            waits.append(sum(float(number) * _UNITS[unit] for number, unit in parts))
    return max(wait for wait in waits if math.isfinite(wait))


def answers(
    api: ApiModel, items: Iterable[Item], ask: Callable[[ApiClient, Item], Coroutine[Any, Any, T]]
) -> Iterator[list[T]]:
    """What `ask` makes of the items, `concurrency` of them at a time, as it comes and in lists of what came together.

    When an item raises, nothing more is sent, what is under way is waited for and given out, and then it is raised.
    When the iterator is closed or interrupted, what came is given out, and what is under way is given up.
    """
    waiting, most = iter(items), api.config.concurrency
    under_way: set[asyncio.Task[None]] = set()
    ready: list[T] = []
    errors: list[BaseException] = []

    async def keep(item: Item) -> None:
        came = await ask(client, item)
        ready.append(came)

    async def go_on() -> bool:
        """Until some are ready; returns whether any are still to come."""
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
                        came, ready = ready, []
                        yield came
            if errors:
                raise errors[0]
        finally:
            for task in under_way:
                task.cancel()
            runner.run(_end(under_way, client))


async def _end(under_way: Iterable[asyncio.Task[Any]], client: ApiClient) -> None:
    await asyncio.gather(*under_way, return_exceptions=True)
    await client.close()


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Asked:
    """Work that asks an API model for continuations.

    `server: vllm` is asked for all of an example's samples in one request, of which it gives sample k the seed plus k,
    as the engine here does. Of other servers nobody knows what they do with a seed and several samples: each is a
    request of its own, so that a sample does not depend on how many were asked for beside it.
    """

    rows: Rows
    refused: Rows
    """Samples that the API will never give (REJECTED schema)."""
    api: ApiModel
    sampling: Sampling
    seed: int
    tokenizer: TokenizerFiles
    """Of the examples."""
    message: Callable[[Mapping[str, Any]], str]
    """From an example (EXAMPLES schema) to what a chat is asked; completions continue `rendered`."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What is the same in all rows."""
    at_once: bool = True

    @property
    def outputs(self) -> list[Rows]:
        """Reasons of the refused, and the samples."""
        return [self.refused, self.rows]

    def open(self) -> Make:
        """Load the tokenizer and look for the key.

        Raises:
            InputError: the extra `openai` is not installed, or the key that the recipe names is not there.
        """
        self.api.check_client()
        top_k, told = self.sampling.top_k, self.api.ledger.unused_top_k
        if top_k and not self.api.obeyed(self.sampling).top_k and top_k not in told:
            told.add(top_k)
            log.info("apis.%s: top_k %d is not used: only server: vllm takes it", self.api.name, top_k)
        return _Asking(self)

    def check(self) -> None:
        """Say what is still missing after the work.

        Raises:
            RunError: requests got no answer, however often they were sent; the others went on.
        """
        self.api.check_answered()


def prompt_of(example: Mapping[str, Any]) -> str:
    """The message that is an example's prompt as it is."""
    return str(example["prompt"])


@dataclass(frozen=True)
class _Wish:
    """Samples of one example, in one request."""

    example: Mapping[str, Any]
    first: int
    """Sample index."""
    request: Request


class _Asking:
    """What makes rows, with what it needs loaded."""

    def __init__(self, asked: Asked):
        self._asked, self._config = asked, asked.api.config
        self._tokenizer: PreTrainedTokenizerBase = asked.tokenizer.load()
        self._eos = eos_token_id(self._tokenizer)
        self._by_ids = self._config.server == "vllm" and self._config.endpoint == "completions"
        self._is_control, self._control = finder(special_tokens(self._tokenizer)), 0

    def __call__(self, batch: pa.Table) -> Iterator[Made]:
        api = self._asked.api
        try:
            for came in answers(api, self._wishes(batch), self._ask):
                made = self._made(came)
                if made.units:
                    yield made
        finally:
            log.info("apis.%s: %s by this command so far", api.name, api.spent())
            if self._control:
                log.warning("apis.%s: %d answers have special tokens in their text; they are text", api.name,
                            self._control)  # fmt: skip
                self._control = 0

    def _wishes(self, batch: pa.Table) -> Iterator[_Wish]:
        examples = {example["example_id"]: example for example in batch.to_pylist()}
        for example_id, first, request in requests(batch, self._asked.seed):
            each = request.n if self._config.server == "vllm" else 1
            for k in range(0, request.n, each):
                yield _Wish(examples[example_id], first + k, Request(request.prompt_ids, each, request.seed + k))

    async def _ask(self, client: ApiClient, wish: _Wish) -> tuple[_Wish, Answer | Refused | Failed]:
        request, example = wish.request, wish.example
        parameters = {"max_tokens": self._asked.sampling.max_new_tokens, "n": request.n, **self._parameters(request)}
        try:
            if self._by_ids:
                return wish, await client.complete(request.prompt_ids, **parameters)
            completed = self._config.endpoint == "completions"
            text = example["rendered"] if completed else self._asked.message(example)
            return wish, await client.say(text, **parameters)
        except (Refused, Failed) as why:
            return wish, why

    def _parameters(self, request: Request) -> dict[str, Any]:
        sampling = self._asked.sampling
        parameters: dict[str, Any] = {"temperature": sampling.temperature}
        if sampling.temperature:
            parameters["seed"] = self._seed(request.seed)
        if self._config.server == "vllm":
            parameters |= {**self._asked.api.neutral(), "top_k": sampling.top_k, "top_p": sampling.top_p}
        elif sampling.top_p < 1:
            parameters["top_p"] = sampling.top_p
        if self._by_ids:
            parameters |= {"return_token_ids": True, "stop_token_ids": [self._eos], "logprobs": 0}
        return parameters

    def _seed(self, seed: int) -> int:
        """The seed that is sent: above 2^53 some servers would round it, and take neighbours for the same."""
        return seed if self._config.server == "vllm" else seed % (1 << 31)

    def _made(self, came: Sequence[tuple[_Wish, Answer | Refused | Failed]]) -> Made:
        rows: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        for wish, outcome in came:
            if isinstance(outcome, Failed):
                continue
            for k in range(wish.request.n):
                result = outcome if isinstance(outcome, Refused) else self._row(wish, k, outcome)
                if isinstance(result, Refused):
                    refused.append({
                        "source": refused_source(wish.first + k), "example_id": wish.example["example_id"],
                        "reason": result.reason, "detail": result.detail,
                    })  # fmt: skip
                else:
                    rows.append(result)
        return Made([refused, rows], len(rows) + len(refused))

    def _row(self, wish: _Wish, k: int, answer: Answer) -> dict[str, Any] | Refused:
        """A row of sample k of an answer (NEGATIVES schema)."""
        choice = answer.choices[k]
        if choice.refusal is not None:
            return choice.refusal
        text, token_ids, ends = self._written(choice, wish.example)
        if not token_ids:
            return Refused("empty", "the limit of tokens was reached before any text was written")
        behind = f", {answer.system_fingerprint}" if answer.system_fingerprint else ""
        return {
            **self._asked.columns,
            "example_id": wish.example["example_id"],
            "sample_index": wish.first + k,
            "text": text,
            "token_ids": token_ids,
            "finish_reason": "stop" if ends else "length",
            "logprob": _logprob(choice.logprobs) if self._by_ids else None,
            "seed": self._seed(wish.request.seed) + k,
            "engine": f"API, {answer.model or self._config.model}{behind}",
        }

    def _written(self, choice: Choice, example: Mapping[str, Any]) -> tuple[str, list[int], bool]:
        """Text, token ids and whether it ends there.

        A chat model does not write where the prompt stops, so its text gets the white space with which the target
        begins, and ends without any; a completion stays as it is.
        """
        ends = not choice.cut
        if self._by_ids:
            return self._decoded(choice), choice.token_ids or [], ends
        text = choice.written or ""
        if self._config.endpoint == "chat":
            target, text = example["target"], text.strip()
            text = target[: len(target) - len(target.lstrip())] + text if text else ""
        text = without_eos(text, self._tokenizer)
        self._control += self._is_control(text)
        token_ids = encode_targets([text], self._tokenizer)[0] + ([self._eos] if ends else [])
        limit = self._asked.sampling.max_new_tokens
        if len(token_ids) <= limit:
            return text, token_ids, ends
        return str(self._tokenizer.decode(token_ids[:limit], skip_special_tokens=True)), token_ids[:limit], False

    def _decoded(self, choice: Choice) -> str:
        """The text of token ids.

        Raises:
            InputError: they are not those of the examples' tokenizer, or there are none.
        """
        ids, api = choice.token_ids, f"apis.{self._asked.api.name}"
        if ids is None:
            raise InputError(f"{api}.server is vllm, but the server gives no token ids: set it to openai")
        written = str(self._tokenizer.decode(without_end(ids, not choice.cut), skip_special_tokens=True))
        if _bare(written) != _bare(choice.text or ""):
            raise InputError(
                f"{api}: the server's tokenizer is not that of the examples: serve a model that has it, or set "
                f"{api}.endpoint to chat, or {api}.server to openai"
            )
        return written


def _bare(text: str) -> str:
    """A text without what may differ between two ways of decoding the same tokens: spaces and broken characters."""
    return re.sub(r"[\s\ufffd]", "", text)


def _logprob(logprobs: Any) -> float | None:
    """Of a completion's tokens, summed, in nats, where the server says it."""
    each = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return float(sum(each)) if each and None not in each else None
