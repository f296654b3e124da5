"""Answers of servers: texts, refusals and errors, in the various forms that servers use."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, field_validator

from cpo_pipe.data.text import one_line
from cpo_pipe.pipeline.api.model import Tokens

if TYPE_CHECKING:
    from httpx2 import Response

DETAIL = 200
"""Longest part of a server's message that is shown or kept, in characters."""

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


class Refused(Exception):
    """The server will not answer this request, now or later."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:DETAIL]


class Failed(Exception):
    """All attempts of a request failed."""


class Retryable(Exception):
    """A request failed, and another attempt may succeed. `counts` is false where the server asks to slow down."""

    def __init__(self, reason: str, *, counts: bool = True):
        super().__init__(reason)
        self.counts = counts


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
        """Whether the answer has reasoning in addition to the text."""
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
    """Of vLLM, if requested."""
    logprobs: Any = None
    error: Any = None
    """Of a text that the server could not finish."""

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
        """Whether there is reasoning in addition to the text."""
        return self.message is not None and self.message.reasoned

    @property
    def refusal(self) -> "Refused | None":
        """The reason for a missing text where a retry would not help; otherwise None."""
        if self._end in _FILTERS:
            return Refused("content filter", self.written or "")
        if self.message is not None and self.message.refusal:
            return Refused("refusal", self.message.refusal)
        if self.written is None and self.reasoned and not self.cut:
            return Refused("empty", "the answer has reasoning, but no text after it")
        return None


class Answer(BaseModel):
    """A server's answer to one request."""

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
        """The tokens used; None where the server does not report them."""
        usage = self.usage if isinstance(self.usage, dict) else {}
        prompt, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return Tokens(prompt, written) if isinstance(prompt, int) and isinstance(written, int) else None

    @property
    def error(self) -> "ServerError | None":
        """The error that an answer of HTTP status 200 reports; None where it reports none."""
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
    """HTTP status, or for an answer of status 200 the one in its body; None where it has none."""
    code: str
    message: str
    text: str
    """The body."""
    where: str = "error"
    """What messages call it, such as HTTP 500."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers of the server behind this one."""

    @classmethod
    def read(cls, body: Any, status: int | None = None, text: str = "") -> "ServerError":
        """Return the error in a JSON body.

        Args:
            body: what the server sent; any JSON value.
            status: the HTTP status, if it is an error.
            text: the body as text, shown where the body has no message.
        """
        body = body[0] if isinstance(body, list) and body else body  # Google puts it into a list
        around = body if isinstance(body, dict) else {}
        inner = around.get("error")
        fields = around | (inner if isinstance(inner, dict) else {"message": inner} if inner else {})
        codes = [value for name in ("code", "status", "status_code", "type") if isinstance(value := fields.get(name),
                 str | int)]  # fmt: skip
        metadata = fields["metadata"] if isinstance(fields.get("metadata"), dict) else {}
        headers = metadata["headers"] if isinstance(metadata.get("headers"), dict) else {}
        # First the message of a proxy, then that of the server behind it, which knows the reason.
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
    """Return the HTTP status of a code in a body; None where it has none."""
    return int(code) if re.fullmatch("[45][0-9]{2}", str(code)) else _STATUSES.get(str(code).lower())


def check_answer(answer: Answer, n: int) -> None:
    """Check that an answer has n valid choices, and sort them.

    Raises:
        Retryable: the answer is invalid.
    """
    answer.choices.sort(key=lambda choice: choice.index or 0)
    if len(answer.choices) != n:
        raise Retryable(f"the answer has {len(answer.choices)} choices, not {n}")
    for choice in answer.choices:
        ended = f"finish_reason {one_line(str(choice.finish_reason), DETAIL)}"
        if choice.failed:
            raise Retryable(f"the server failed in the middle of a text ({ended})")
        if choice.refusal is None and choice.written is None and not choice.cut:  # a limit may come before any text
            raise Retryable(f"a choice without text ({ended})")


def body_of(response: "Response") -> Any:
    """Return the JSON in a response; None where it is not JSON."""
    try:
        return response.json()
    except ValueError:
        return None


def title_of(response: "Response") -> str:
    """Return the text of a response, or the title of a web page, such as proxies send."""
    title = re.search(r"<title[^>]*>(.*?)</title>", response.text, re.IGNORECASE | re.DOTALL)
    return title[1] if title else response.text or response.reason_phrase
