"""One question to a language model behind an API, and its answer without reasoning."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cpo_pipe.pipeline.api.answers import Failed, Refused
from cpo_pipe.pipeline.api.client import ApiClient
from cpo_pipe.pipeline.api.model import ApiModel

KEPT = 200
"""Characters of an answer that are stored."""

AROUND = r"[\s\"'“”‘’*_`()\[\]{}<>.,:#-]*"
"""What models write around a short answer, as a regular expression."""

_OPENED = re.compile(r"\s*<think>.*</think>", re.DOTALL)
_CLOSED = re.compile(r".*\n\s*</think>\s*\n", re.DOTALL)
"""Reasoning before the answer, if the server does not separate it. If the chat template writes the opening tag, not the
model, the closing tag must be on a line of its own."""


def check_template(template: str, known: Collection[str], places: Sequence[str]) -> str:
    """Return the template of a question: a known name, or a text that has all places.

    Raises:
        ValueError: it is neither.
    """
    if template not in known and not all(place in template for place in places):
        raise ValueError(f"{template!r} is not {', '.join(known)} or a text with {', '.join(places)}")
    return template


@dataclass(frozen=True)
class Reply:
    """What came back for a question."""

    text: str
    """The answer as written, perhaps with its reasoning."""
    details: Mapping[str, str]
    """What to store with it: the model that answered, or what the server says instead of an answer."""
    fault: str = ""
    """Why there is no answer, such as `refusal`; a further request would not get one."""


async def ask(
    client: ApiClient, api: ApiModel, question: str, max_tokens: int, temperature: float | None
) -> Reply | None:
    """Return the reply to a question; None if all attempts failed, which the API's ledger counts.

    Args:
        client: of the API.
        api: the API.
        question: a user's message, or a text to complete, by the API's endpoint.
        max_tokens: the longest answer, in tokens.
        temperature: softmax temperature; None: none is sent.

    Raises:
        InputError: the server rejects the request.
        RunError: a cap is reached, or the server stopped answering.
    """
    parameters = api.neutral()
    if temperature is not None:
        parameters["temperature"] = temperature
    try:
        answer = await client.say(question, max_tokens, **parameters)
    except Refused as refused:
        return Reply("", {"detail": refused.detail}, refused.reason)
    except Failed:
        return None
    (choice,) = answer.choices
    served = {"model": answer.model or api.config.model}
    if choice.refusal is not None:
        return Reply("", {"detail": choice.refusal.detail[:KEPT], **served}, choice.refusal.reason)
    written = choice.written or ""
    if choice.cut and ("think>" in written or (choice.reasoned and not written)):
        return Reply("", {"answer": written[:KEPT], **served}, "cut in its thoughts")
    return Reply(written, served)


def without_reasoning(answer: str) -> str | None:
    """Return what follows an answer's reasoning; None where a closing tag is quoted, perhaps from the question."""
    if "</think>" not in answer:
        return answer
    thought = _OPENED.match(answer) or _CLOSED.match(answer)
    if thought is None or answer.count("</think>") > 1:
        return None
    return answer[thought.end() :].lstrip()
