"""Conversations, and the token ids that a tokenizer's chat template gives their last prompt and answer.

A conversation is rendered with its answer as one text. Its token ids are split where the generation prompt ends, so
that a target begins with what the template writes before an answer (such as an empty `<think>` block) and ends in the
token that ends a turn.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.control_tokens import breaker_of, control_tokens, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""A message as chat templates take it: `role`, `content`, and what else the template reads (`tool_calls`, …)."""

_PROBE = "zq7"
"""A text that no template writes."""


class NotRenderable(ValueError):
    """A conversation that a chat template cannot render, or whose prompt is no prefix of the whole.

    `reason` is for counting, the message shows what is wrong.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """The messages before an answer, and the tools that the model may call."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of_text(cls, prompt: str) -> "Conversation":
        """Return the conversation that consists of one user message."""
        return cls([{"role": "user", "content": prompt}])

    @classmethod
    def of_example(cls, example: Mapping[str, Any]) -> "Conversation":
        """Return the conversation of a row with the columns `prompt` and `messages` of the EXAMPLES schema."""
        written = example["messages"]
        return cls.of_text(example["prompt"]) if written is None else cls(**json.loads(written))

    def to_json(self) -> str:
        """Return the column `messages` of the EXAMPLES schema."""
        return to_json({"messages": self.messages, "tools": self.tools})

    @property
    def text(self) -> str:
        """The prompt for readers: the user's message if it is the only one, otherwise all with their roles."""
        shown = [message for message in self.messages if message["role"] != "system"]
        if [message["role"] for message in shown] == ["user"]:
            return str(shown[0]["content"])
        return "\n\n".join(f"{message['role']}: {content_of(message)}" for message in self.messages)


def to_json(value: Any) -> str:
    """Return messages or tools as JSON; characters outside ASCII are written as they are."""
    return json.dumps(value, ensure_ascii=False)


def content_of(message: Message) -> str:
    """Return the text of a message; calls of tools are written as JSON."""
    parts = [str(message[key]) for key in ("reasoning_content", "content") if message.get(key)]
    parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n\n".join(parts)


class ChatTemplate:
    """A tokenizer's chat template, with the settings of a recipe.

    Control tokens in the texts of messages are text: a space after their first character breaks them. In an
    assistant's messages, tokens that are not declared special stay tokens (`<think>`).

    Args:
        tokenizer: a tokenizer that has a chat template.
        date: the date that the template prints (ISO 8601), where it prints one; see chat_date.py.
        settings: further arguments of the template, such as `enable_thinking`.

    Raises:
        InputError: the tokenizer has no chat template, or it fails on a user's message.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", date: str | None = None, settings: Mapping[str, Any] | None = None
    ):
        if not tokenizer.chat_template:
            raise InputError(
                "data.template is chat, but the tokenizer has no chat template; "
                "use plain, dolly or a text with {prompt}, or give the tokenizer of a chat model"
            )
        self._tokenizer = tokenizer
        self._arguments: dict[str, Any] = dict(settings or {})
        if date is not None:
            self._arguments["strftime_now"] = datetime.fromisoformat(date).strftime
        self._special = {*special_tokens(tokenizer).values()}
        self._control = self._special | {*control_tokens(tokenizer).values()}
        self._break_all = breaker_of(control_tokens(tokenizer))
        self._break_special = breaker_of(special_tokens(tokenizer))
        self._blank: dict[int, bool] = {}
        try:
            self._render([{"role": "user", "content": _PROBE}], (), add_generation_prompt=True)
        except NotRenderable as error:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path}: its chat template fails on a user's message ({error}); "
                "correct the chat template, or set data.template to plain, dolly or a text with {prompt}"
            ) from error

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", rendering: Spec) -> "ChatTemplate":
        """Return the template with the settings of examples (`Examples.rendering`)."""
        return cls(tokenizer, rendering.get("chat_date"), rendering.get("chat_template_kwargs"))

    def prompt(self, conversation: Conversation) -> str:
        """Return the text that the model is given: the messages and the generation prompt.

        Raises:
            NotRenderable: the template fails on these messages.
        """
        messages = [self._as_text(message) for message in conversation.messages]
        return self._render(messages, conversation.tools, add_generation_prompt=True)

    def encode(self, conversation: Conversation, answer: Message) -> tuple[str, list[int], list[int]]:
        """Return the rendered prompt and the token ids of prompt and answer.

        Both together are the ids of the whole conversation as `apply_chat_template` gives them, up to the token that
        ends the answer's turn. Where the template writes no such token, the tokenizer's EOS token ends the answer.

        Raises:
            NotRenderable: the template fails or writes nothing of the answer, or the whole conversation does not begin
                with the prompt.
        """
        prompt = self.prompt(conversation)
        messages = [*map(self._as_text, conversation.messages), self._as_text(answer)]
        whole = self._render(messages, conversation.tools, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise NotRenderable("prompt is not a prefix", _difference(prompt, whole))
        prompt_ids, ids = self._ids(prompt), self._ids(whole)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise NotRenderable("prompt is not a prefix", self._merged(prompt_ids, ids))
        answer_ids = self._until_end(ids[len(prompt_ids) :])
        if len(answer_ids) == 1 and content_of(answer).strip():
            raise NotRenderable("answer is not rendered", "the chat template writes nothing of the assistant's message")
        return prompt, self._without_second_bos(prompt_ids), answer_ids

    def whole_ids(self, conversation: Conversation, answer: Message) -> list[int]:
        """Return the token ids of a whole conversation with its answer, as the template writes it.

        Raises:
            NotRenderable: the template fails on these messages.
        """
        messages = [self._as_text(message) for message in [*conversation.messages, answer]]
        whole = self._render(messages, conversation.tools, add_generation_prompt=False)
        return self._without_second_bos(self._ids(whole))

    def whole(self, conversation: Conversation, answer: Message) -> Conversation:
        """Return a conversation with its answer as `encode` gives it to the template.

        Control tokens are broken, and arguments of calls are JSON text where the template wants that.
        """
        messages = [*map(self._as_text, conversation.messages), self._as_text(answer)]
        tools = self._as_text(conversation.tools, self._break_all)
        try:
            self._rendered(messages, tools, add_generation_prompt=False)
        except Exception:  # as in _render
            messages = [_with_written_arguments(message) for message in messages]
        return Conversation(messages, tools)

    def without_end(self, answer: Message) -> Message:
        """Return an answer without end tokens written at its end: what encodes it puts one there."""
        content, ends = str(answer.get("content") or ""), self._written_ends
        while end := next((end for end in ends if content.rstrip().endswith(end)), None):
            content = content.rstrip().removesuffix(end)
        return {**answer, "content": content}

    def text_of(self, answer: Message, token_ids: list[int]) -> str:
        """Return the text of an encoded answer: its content, or what the template makes of it where that is more."""
        content = str(answer.get("content") or "")
        decoded = str(self._tokenizer.decode(token_ids[:-1], skip_special_tokens=True))
        return content if decoded.strip() == self._break_special(content).strip() else decoded

    @cached_property
    def _written_ends(self) -> list[str]:
        tokens = [self._tokenizer.eos_token_id, self.end_of_turn]
        texts = [str(self._tokenizer.convert_ids_to_tokens(token)) for token in tokens if token is not None]
        return [text for text in texts if text.strip()]

    @cached_property
    def opening(self) -> str:
        """What the template writes between the generation prompt and an answer, such as an empty thought."""
        asked = {"role": "user", "content": "a"}
        try:
            prompt = self._render([asked], (), add_generation_prompt=True)
            whole = self._render([asked, {"role": "assistant", "content": _PROBE}], (), add_generation_prompt=False)
        except NotRenderable:  # of templates that want other messages than these
            return ""
        return whole.partition(_PROBE)[0].removeprefix(prompt) if whole.startswith(prompt) else ""

    @cached_property
    def ending_template(self) -> str | None:
        """The chat template, but without what it writes after the end of the last turn; None: it writes nothing there.

        For programs that train on all that a template writes, such as TRL.
        """
        if self.end_of_turn is None:
            return None
        asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
        after = self._ids(self._render([asked, answer], (), add_generation_prompt=False).partition(_PROBE)[2])
        more = str(self._tokenizer.decode(after[after.index(self.end_of_turn) + 1 :]))
        if not more:
            return None
        return (
            f"{{%- set written %}}{self._tokenizer.chat_template}{{% endset -%}}\n"
            f"{{%- set ends = not add_generation_prompt and messages[-1]['role'] == 'assistant' "
            f"and written.endswith({more!r}) -%}}\n"
            f"{{{{- written[:{-len(more)}] if ends else written -}}}}"
        )

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that the template writes after an answer, whether or not the conversation goes on; None: none."""
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            wholes = [
                self._render(messages, (), add_generation_prompt=False)
                for messages in (turn, [*turn, {"role": "user", "content": "b"}])
            ]
        except NotRenderable:  # of templates that take one turn only
            return None
        one, other = (whole.partition(_PROBE)[2] for whole in wholes)
        after = self._ids(one[: common_length(one, other)])
        return next((token for token in after if token in self._control), None)

    def _until_end(self, answer_ids: list[int]) -> list[int]:
        """Return the ids of an answer up to the token that ends it, without what the template writes behind that."""
        start = len(answer_ids)
        while start and (answer_ids[start - 1] in self._control or self._is_blank(answer_ids[start - 1])):
            start -= 1
        tail = range(start, len(answer_ids))
        ends = [place for place in tail if answer_ids[place] == self.end_of_turn] or [
            place for place in tail if answer_ids[place] in self._special
        ]
        if ends:
            return answer_ids[: ends[0] + 1]
        return [*answer_ids[:start], int(self._tokenizer.eos_token_id)]

    def _as_text(self, value: Any, breaks: Callable[[str], str] | None = None) -> Any:
        """Return a message, or a part of one, with the control tokens in its texts broken."""
        if isinstance(value, Mapping):
            breaks = breaks or (self._break_special if value["role"] == "assistant" else self._break_all)
            return {key: part if key == "role" else self._as_text(part, breaks) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._as_text(part, breaks) for part in value]
        return (breaks or self._break_all)(value) if isinstance(value, str) else value

    def _render(self, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool) -> str:
        try:
            return self._rendered(messages, tools, add_generation_prompt)
        except Exception as error:  # a template fails in its own words, or in any of Python's ways
            written = [_with_written_arguments(message) for message in messages]
            if written != messages:  # some templates want the arguments of a call as JSON text
                try:
                    return self._rendered(written, tools, add_generation_prompt)
                except Exception:
                    pass
            raise NotRenderable("chat template fails", cause(error)) from error

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=self._as_text(tools, self._break_all) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._arguments,
            )
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _without_second_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._blank[token]

    def _merged(self, prompt_ids: list[int], ids: list[int]) -> str:
        place = common_length(prompt_ids, ids)
        alone, together = (self._tokenizer.convert_ids_to_tokens(part[place : place + 1]) for part in (prompt_ids, ids))
        return f"the prompt's token {place} is {alone} alone, but {together} with the answer behind it"


def _with_written_arguments(message: Message) -> Message:
    """Return a message with the arguments of its calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many elements two sequences have in common at their start."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _difference(prompt: str, whole: str) -> str:
    """Return where a rendered prompt and the whole conversation first differ."""
    place = common_length(prompt, whole)
    alone, together = (repr(text[max(place - 20, 0) : place + 40]) for text in (prompt, whole))
    return f"character {place}: the prompt has {alone}, the whole conversation {together}"
