"""Texts of any origin, encoded as answers to the prompts of examples: like the targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.chat import ChatTemplate, Conversation, Message, NotRenderable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """An encoded answer."""

    text: str
    token_ids: list[int]
    """They end in the token that ends the target of the example, where `ends`."""
    ends: bool
    """Whether the answer is complete."""
    message: Message | None = None
    """What the chat template rendered."""
    problem: str = ""
    """Why the chat template cannot render it; then it has no tokens."""


class AnswerEncoder:
    """Encodes answers to examples as their targets are encoded.

    With a chat template, an answer is a message of the assistant after the example's messages, so that what the
    template writes before an answer and behind it is the same as in targets. Otherwise it is tokenized apart.

    Args:
        tokenizer: of the examples.
        rendering: of the examples (`Examples.rendering`).
        continuations: the texts continue the prompts: where the tokenizer adds a space before a text, a leading space
            of the text is removed.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", rendering: Spec, *, continuations: bool = False):
        self._tokenizer = tokenizer
        self._eos = templates.eos_token_id(tokenizer)
        self._chat = ChatTemplate.of(tokenizer, rendering) if rendering["template"] == templates.CHAT else None
        self._doubles_space = continuations and _doubles_space(tokenizer)

    def encode(
        self,
        examples: Sequence[Mapping[str, Any]],
        answers: Sequence[str | Message],
        max_tokens: int,
        ends: Sequence[bool] | None = None,
    ) -> list[Answer]:
        """Encode one answer to each example.

        Args:
            examples: rows with `prompt`, `messages`, `target_ids` and `ends` of the EXAMPLES schema.
            answers: texts, or messages of the assistant.
            max_tokens: length limit with the end token; longer answers are cut to it and do not end.
            ends: whether each answer is complete (default: all are).
        """
        if self._doubles_space:
            answers = [answer.removeprefix(" ") if isinstance(answer, str) else answer for answer in answers]
        found = self._encode_texts(answers) if self._chat is None else self._encode_messages(examples, answers)
        whole = [True] * len(answers) if ends is None else ends
        return [
            self._limited(answer, example, max_tokens, complete)
            for answer, example, complete in zip(found, examples, whole, strict=True)
        ]

    def _encode_texts(self, answers: Sequence[str | Message]) -> list[Answer]:
        texts = [answer if isinstance(answer, str) else str(answer["content"]) for answer in answers]
        texts = [templates.without_eos(text, self._tokenizer) for text in texts]
        encoded = templates.encode_targets(texts, self._tokenizer)
        return [Answer(text, ids, False) for text, ids in zip(texts, encoded, strict=True)]

    def _encode_messages(self, examples: Sequence[Mapping[str, Any]], answers: Sequence[str | Message]) -> list[Answer]:
        assert self._chat is not None
        found = []
        for example, answer in zip(examples, answers, strict=True):
            message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
            message = self._chat.without_end(message)
            try:
                _, _, ids = self._chat.encode(Conversation.of_example(example), message)
            except NotRenderable as error:
                found.append(Answer("", [], False, problem=f"{error.reason}: {error}"))
                continue
            found.append(Answer(self._chat.text_of(message, ids), ids[:-1], False, message))
        return found

    def _limited(self, answer: Answer, example: Mapping[str, Any], max_tokens: int, complete: bool) -> Answer:
        """Return an answer without end token cut to the limit, or with its end token where there is room for it."""
        ids = answer.token_ids
        if len(ids) > max_tokens:
            cut = ids[:max_tokens]
            return Answer(str(self._tokenizer.decode(cut, skip_special_tokens=True)), cut, False)
        if complete and len(ids) < max_tokens and not answer.problem:
            return Answer(answer.text, [*ids, end_token(example, self._eos)], True, answer.message)
        return answer


def end_token(example: Mapping[str, Any], default: int) -> int:
    """Return the token that ends the target of an example (EXAMPLES schema); `default` where its target is cut."""
    return int(example["target_ids"][-1]) if example["ends"] else default


def text_behind(prompt_ids: Sequence[int], token_ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text that tokens add to a prompt.

    Both are decoded together, since SentencePiece-like tokenizers remove a leading space from what they decode.
    """
    before, both = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (list(prompt_ids), [*prompt_ids, *token_ids])
    )
    return both[len(before) :]


def _doubles_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether encoding adds a space before a text, also before one that begins with a space (Llama).

    For such a tokenizer, the space that it adds is the one between prompt and continuation.
    """
    text, spaced = templates.encode_texts(["a", " a"], tokenizer)
    return text != spaced and text_behind(text, text, tokenizer) == " a"
