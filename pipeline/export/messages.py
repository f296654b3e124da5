"""Messages from which TRL makes the token ids that we train on.

TRL renders the prompt's messages together with the completion's by the tokenizer's chat template. It also trains on
what the template writes after the token that ends the turn, where our ids stop. An export has a template of its own
for such tokenizers, which stops there as well.
"""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from datetime import datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.chat import ChatTemplate, Conversation, Message, to_json
from cpo_pipe.data.models.templates import CHAT
from cpo_pipe.pipeline.export.trl_tokens import PromptedCandidate, WrittenCandidate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ["messages", "message", "target_ids", "rejected"]
_TEXT = {"role", "content"}
"""The keys of a message that is a text."""


class MessageWriter:
    """Writes candidates as messages, which TRL renders by the tokenizer's chat template.

    Args:
        tokenizer: of the examples.
        rendering: of the examples (`Examples.rendering`).
        selection: the examples (EXAMPLES schema).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", rendering: Spec, selection: pa.Table):
        self._known: dict[bytes, Message] = {}
        """Answers that are more than a text, by their token ids."""
        self.has_more = self.has_tools = False
        """Whether messages have more than a role and a text, and whether there are tools."""
        for example in (row for batch in selection.select(_COLUMNS).to_batches() for row in batch.to_pylist()):
            self._look_at(example)
        self._chat = ChatTemplate.of(tokenizer, rendering) if rendering["template"] == CHAT else None
        self.chat_template = self._chat.ending_template if self._chat is not None else None
        """What TRL's tokenizer must use in place of its own chat template; None: its own."""
        self._tokenizer = copy(tokenizer)
        if self.chat_template is not None:
            self._tokenizer.chat_template = self.chat_template
        self._arguments: dict[str, Any] = dict(rendering.get("chat_template_kwargs") or {})
        if "chat_date" in rendering:  # TRL prints the day on which it renders, which is not that of our ids
            self._arguments["strftime_now"] = datetime(1970, 1, 1).strftime

    def _look_at(self, example: Mapping[str, Any]) -> None:
        if example["messages"] is not None:
            asked = json.loads(example["messages"])
            self.has_more = self.has_more or any(message.keys() != _TEXT for message in asked["messages"])
            self.has_tools = self.has_tools or bool(asked["tools"])
        targets = [{"token_ids": example["target_ids"], "message": example["message"]}]
        for answer in (*targets, *(example["rejected"] or ())):
            if answer["message"] is not None and (message := json.loads(answer["message"])).keys() != _TEXT:
                self._known.setdefault(_key(answer["token_ids"]), message)
                self.has_more = True

    def write(self, candidates: Sequence[PromptedCandidate]) -> list[WrittenCandidate]:
        """Return candidates as messages: those of the data, or messages with the candidate's text."""
        return [self._write(candidate) for candidate in candidates]

    def _write(self, candidate: PromptedCandidate) -> WrittenCandidate:
        ways = self._ways(candidate)
        first = next(ways)
        exact = (written for written in chain([first], ways) if written.same_ids)
        return next(exact, first)

    def _ways(self, candidate: PromptedCandidate) -> Iterator[WrittenCandidate]:
        """Yield what the messages may be: a template may write the start of a text itself, or read it from there."""
        if (known := self._known.get(_key(candidate.token_ids))) is not None:
            yield self._as_messages(candidate, known)
        opening = self._chat.opening if self._chat is not None else ""
        for content in dict.fromkeys([candidate.text.removeprefix(opening), candidate.text]):
            yield self._as_messages(candidate, {"role": "assistant", "content": content})

    def _as_messages(self, candidate: PromptedCandidate, answer: Message) -> WrittenCandidate:
        asked = candidate.conversation
        if self._chat is None:
            whole = Conversation([*asked.messages, answer], asked.tools)
        else:
            whole = self._chat.whole(asked, answer)
        return WrittenCandidate(
            prompt=whole.messages[:-1],
            completion=whole.messages[-1:],
            same_ids=self._their_ids(whole) == candidate.all_ids,
            tools=to_json(whole.tools) if whole.tools else None,
        )

    def _their_ids(self, whole: Conversation) -> list[int]:
        """Return the ids that TRL makes of a conversation; none where the template fails."""
        if not self._tokenizer.chat_template:
            return []
        try:
            found: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in whole.messages], tools=[*map(dict, whole.tools)] or None,
                tokenize=True, return_dict=True, **self._arguments,
            )  # fmt: skip
        except Exception:  # a template fails in its own words, or in any of Python's ways
            return []
        return list(found["input_ids"])


def _key(token_ids: Sequence[int]) -> bytes:
    """Return token ids in a form that takes little memory."""
    return array("i", token_ids).tobytes()
