"""The formats of rows with prompts and answers, and what a row of each holds.

`FORMATS` lists them with the columns by which they are recognized. A reader turns the values of a row into `Turn`s:
most formats give one, a conversation gives one for each answer of the assistant (`data.turns: every`) or its last.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.chat import Conversation, Message, common_length
from cpo_pipe.data.text import abridged, listed

FormatName = Literal["pairs", "messages", "sharegpt", "alpaca", "preference", "prompt-completion"]
"""`pairs` is the format of rows whose columns `data.columns` names; the others are in `FORMATS`."""

Values = Mapping[str, Any]
"""A row's values by column."""


class Unusable(ValueError):
    """A row that breaks a rule of its format; `reason` is for counting, the message names the column and the value."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """An answer, what it answers, and other answers that are worse."""

    prompt: Conversation
    answer: Message
    rejected: Sequence[Message] = ()
    conversational: bool = True
    """Whether the row has messages; otherwise the prompt is one text."""


@dataclass(frozen=True)
class Format:
    """A format of rows."""

    columns: tuple[str, ...]
    """Columns by which it is recognized."""
    optional: tuple[str, ...]
    """Columns that it reads where they are there."""
    read: Callable[[Values], Iterator[Turn]]
    """Yield the answers of a row, in order.

    Raises:
        Unusable: the row breaks a rule.
    """


def detect(columns: Sequence[str], source: str) -> str:
    """Return the name of the format of a source with these columns; `source` is its key and name, for messages.

    Raises:
        InputError: no format has these columns.
    """
    for name, known in FORMATS.items():
        if all(column in columns for column in known.columns):
            return name
    known_columns = "; ".join(f"{name}: {listed(known.columns)}" for name, known in FORMATS.items())
    raise InputError(
        f"{source}: its columns ({listed(columns)}) are those of no known format; set data.columns.prompt "
        f"and data.columns.target, or rename columns ({known_columns})"
    )


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
"""Names that data sets have for the roles of chat templates."""
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


def messages_in(value: Any, column: str) -> list[dict[str, Any]]:
    """Return messages from a list of `{role, content}` or of ShareGPT's `{from, value}`; JSON text is parsed.

    Raises:
        Unusable: the value is no such list.
    """
    value = _parsed(value)
    if not isinstance(value, list | tuple) or not value:
        raise Unusable("not messages", f"column {column} is {_shown(value)}, not a list of messages")
    return [_message(one, f"column {column}, message {number}") for number, one in enumerate(value)]


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Unusable("not messages", f"{place} is {_shown(value)}, not an object with role and content")
    value = {key: part for key, part in value.items() if part is not None}  # Arrow has null for absent keys
    if "from" in value:
        value = {"role": value["from"], "content": value.get("value")}
    role, content = value.get("role"), value.get("content")
    if role == "function_call":  # of ShareGPT: the call as JSON
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, place)}
    role = _ROLES.get(str(role), role)
    if role not in _KNOWN_ROLES:
        raise Unusable("unknown role", f"{place} has the role {_shown(role)}; known are {listed(_KNOWN_ROLES)}")
    message = {**value, "role": role, "content": _content(content, place)}
    if calls := value.get("tool_calls"):
        message["tool_calls"] = _calls(calls, place)
    if role == "assistant" and "reasoning" in value:  # the other name of the same
        message["reasoning_content"] = message.pop("reasoning")
    return message


def _content(value: Any, place: str) -> str:
    """Return the text of a message; parts of type `text` are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list | tuple) else ()
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type", "text") == "text"]
    if len(texts) != len(parts) or not parts or not all(isinstance(text, str) for text in texts):
        raise Unusable("not text", f"{place} has the content {_shown(value)}, which is not text")
    return "".join(map(str, texts))


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Return calls of tools as templates take them: with the arguments as an object, not as JSON text."""
    value = _parsed(value)
    calls = []
    for given in value if isinstance(value, list | tuple) else [value]:
        call = _parsed(given)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Unusable("not a call", f"{place} has the call {_shown(given)}, without a function's name")
        rest = {key: part for key, part in call.items() if key not in ("function", "name", "arguments")}
        arguments = {"arguments": _parsed(function["arguments"])} if "arguments" in function else {}
        calls.append({"type": "function", **rest, "function": {**function, **arguments}})
    return calls


def _tools(values: Values) -> list[dict[str, Any]]:
    tools = _parsed(values.get("tools")) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("not tools", f"column tools is {_shown(tools)}, not a list of functions")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _conversation(column: str) -> Callable[[Values], Iterator[Turn]]:
    def read(values: Values) -> Iterator[Turn]:
        messages, tools = messages_in(values[column], column), _tools(values)
        if not any(message["role"] == "assistant" for message in messages):
            raise Unusable("no answer", f"column {column} has no message of the assistant")
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                yield Turn(Conversation(messages[:place], tools), message)

    return read


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(values: Values, column: str) -> str:
    value = values.get(column)
    if value is None:
        raise Unusable("missing field", f"column {column}")
    if not isinstance(value, str):
        raise Unusable("not text", f"column {column} has type {type(value).__name__}: {_shown(value)}")
    return value


def texts(value: Any, column: str) -> list[Message]:
    """Return answers that are one text, a list of texts, or none."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [_answer(_text({column: one}, column)) for one in values]


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _alpaca(values: Values) -> Iterator[Turn]:
    prompt = _text(values, "instruction")
    if values.get("input") is not None and (more := _text(values, "input")).strip():
        prompt = f"{prompt}\n\n{more}"
    past: list[Message] = []
    history = _parsed(values.get("history")) or ()
    for turn in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(turn, list | tuple) or [type(text) for text in turn] != [str, str]:
            raise Unusable("not a history", f"column history has {_shown(turn)}, not a question with its answer")
        past += [{"role": "user", "content": turn[0]}, _answer(turn[1])]
    conversation = Conversation([*past, {"role": "user", "content": prompt}])
    yield Turn(conversation, _answer(_text(values, "output")), conversational=bool(past))


def _prompt_completion(values: Values) -> Iterator[Turn]:
    turn = of_prompt(values.get("prompt"), values["completion"], "completion")
    yield replace(turn, prompt=replace(turn.prompt, tools=_tools(values)))


# ── preferences ──────────────────────────────────────────────────────────────────────────────────────────────────────

_HH = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _preference(values: Values) -> Iterator[Turn]:
    turn = preference(values.get("prompt"), values["chosen"], values["rejected"])
    yield replace(turn, prompt=replace(turn.prompt, tools=_tools(values)))


def preference(prompt: Any, chosen: Any, rejected: Any) -> Turn:
    """Return a chosen answer with the rejected ones, which must answer the same prompt.

    Args:
        prompt: a text or messages; None: the answers begin with it.
        chosen: a text or messages.
        rejected: an answer in the form of the chosen one, or a list of such; None: no rejected answer.

    Raises:
        Unusable: an answer is missing, or the answers have different prompts.
    """
    chosen = _messages_or_text(chosen)
    answers = [] if rejected is None else _several(_messages_or_text(rejected), chosen)
    if prompt is None and isinstance(chosen, str):
        return _implicit(chosen, answers)
    turn = of_prompt(prompt, chosen, "chosen")
    others = [of_prompt(prompt, one, "rejected") for one in answers]
    for other in others:
        if other.prompt != turn.prompt:
            raise Unusable("another prompt", f"column rejected answers {_shown(other.prompt.text)}, not the prompt")
    return replace(turn, rejected=[other.answer for other in others])


def _several(rejected: Any, chosen: Any) -> list[Any]:
    """Return the rejected answers: one in the form of the chosen one, or a list of such."""
    if isinstance(chosen, str):
        return list(rejected) if isinstance(rejected, list | tuple) else [rejected]
    is_list_of_lists = isinstance(rejected, list | tuple) and rejected and isinstance(rejected[0], list | tuple)
    return list(rejected) if is_list_of_lists else [rejected]


def of_prompt(prompt: Any, answer: Any, column: str) -> Turn:
    """Return the turn of a prompt (text, messages or None) and an answer (text, or messages that may repeat it)."""
    prompt, answer = _messages_or_text(prompt), _messages_or_text(answer)
    if isinstance(answer, str):
        if isinstance(prompt, str):
            return Turn(Conversation([{"role": "user", "content": prompt}]), _answer(answer), conversational=False)
        return Turn(Conversation(messages_in(prompt, "prompt")), _answer(answer))
    if answer is None:
        raise Unusable("missing field", f"column {column}")
    *before, last = messages_in(answer, column)
    if last["role"] != "assistant":
        raise Unusable("no answer", f"column {column} ends in a message of the role {last['role']}, not the assistant")
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []
    given = given or ([] if prompt is None else messages_in(prompt, "prompt"))
    if before[: len(given)] == given:
        given = []  # the answer's messages repeat the prompt
    elif any(message["role"] == "user" for message in before) and given == before[-len(given) :]:
        given = []  # and have a system message before it
    return Turn(Conversation([*given, *before]), last)


def _implicit(chosen: str, rejected: Sequence[Any]) -> Turn:
    """Return the turn of two texts that begin with their common prompt.

    Texts with `Human:` and `Assistant:` (Bai et al. 2022, HH) are conversations. Otherwise the common start of both,
    up to its last space, is the prompt.
    """
    texts = [chosen, *(_text({"rejected": one}, "rejected") for one in rejected)]
    if all("\n\nAssistant:" in text for text in texts):
        turns = [of_prompt(None, _hh(text), "chosen" if place == 0 else "rejected")
                 for place, text in enumerate(texts)]  # fmt: skip
        if any(turn.prompt != turns[0].prompt for turn in turns):
            raise Unusable("another prompt", "columns chosen and rejected do not answer the same messages")
        return replace(turns[0], rejected=[turn.answer for turn in turns[1:]])
    common = chosen[: min((common_length(chosen, text) for text in texts[1:]), default=0)]
    place = common.rfind(" ") if len(common) < min(map(len, texts)) else -1
    if place <= 0:
        raise Unusable("no prompt", "there is no column prompt, and chosen and rejected do not begin alike")
    return Turn(
        Conversation([{"role": "user", "content": chosen[:place]}]), _answer(chosen[place:]),
        [_answer(text[place:]) for text in texts[1:]], conversational=False,
    )  # fmt: skip


def _hh(text: str) -> list[dict[str, str]]:
    _, *parts = _HH.split(text)
    roles, texts = parts[::2], parts[1::2]
    return [{"role": "user" if role == "Human" else "assistant", "content": content.strip()}
            for role, content in zip(roles, texts, strict=True)]  # fmt: skip


def _messages_or_text(value: Any) -> Any:
    """Return messages that are written as JSON text, as in CSV. Other texts stay texts: an answer may be JSON."""
    found = _parsed(value)
    is_messages = (
        isinstance(found, list)
        and found
        and all(isinstance(one, Mapping) and not {"role", "from"}.isdisjoint(one) for one in found)
    )
    return found if is_messages else value


def _parsed(value: Any) -> Any:
    """Return what a JSON text holds, where it is an object or a list; CSV has no other way to write one."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _shown(value: Any) -> str:
    return abridged(repr(value), 100)


def with_system(conversation: Conversation, system: str) -> Conversation:
    """Return a conversation with a system message before it, unless it begins with one of its own."""
    if conversation.messages[:1] and conversation.messages[0]["role"] in ("system", "developer"):
        return conversation
    return replace(conversation, messages=[{"role": "system", "content": system}, *conversation.messages])


FORMATS = {
    "preference": Format(("chosen", "rejected"), ("prompt", "tools", "system"), _preference),
    "messages": Format(("messages",), ("tools", "system"), _conversation("messages")),
    "sharegpt": Format(("conversations",), ("tools", "system"), _conversation("conversations")),
    "prompt-completion": Format(("prompt", "completion"), ("tools", "system"), _prompt_completion),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _alpaca),
}
