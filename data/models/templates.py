"""How a prompt is put before the model: templates, and the token ids of prompts and targets."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.chat import ChatTemplate, Conversation, NotRenderable
from cpo_pipe.data.models.control_tokens import breaker, breaker_of, control_tokens, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"
DOLLY = "dolly"
CHAT = "chat"

# Taori et al. 2023 (Stanford Alpaca), whose wording most instruction-tuned models have seen.
_DOLLY = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
_DOLLY_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n"
)


def fill(template: str, **texts: str) -> str:
    """Return a template with the texts in the places {name}."""
    # One pass, and not str.format: other braces, in the template or in a text, are only text.
    return re.sub(rf"\{{({'|'.join(texts)})\}}", lambda place: texts[place[1]], template)


def with_context(prompt: str, context: str) -> str:
    """Return a prompt and its context as one text: the context follows after a blank line."""
    return f"{prompt}\n\n{context}" if context.strip() else prompt


def render(template: str, prompt: str, context: str = "") -> str:
    """Return the text that the model is given; for `chat` see chat.py.

    A template without a place for the context (`plain`, a text without {context}) has it after the prompt.

    Args:
        template: `plain`, `dolly`, or a text with {prompt} and perhaps {context}.
        prompt: the prompt as the source has it.
        context: further input; empty where there is none.
    """
    if template == DOLLY:
        template = _DOLLY_WITH_CONTEXT if context.strip() else _DOLLY
    if template == PLAIN:
        return with_context(prompt, context)
    if "{context}" not in template:
        prompt = with_context(prompt, context)
    return fill(template, prompt=prompt, context=context)


def encode_prompts(template: str, rendered: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return token ids of rendered prompts: with the BOS token that the tokenizer or the template puts there, once.

    An EOS token that the tokenizer appends is removed.
    """
    # A chat template writes its special tokens, BOS included, into the text itself.
    ids = _encode(rendered, tokenizer, add_special_tokens=template != CHAT)
    appended = 0 if template == CHAT else _appended_tokens(tokenizer)
    twice = [tokenizer.bos_token_id] * 2  # the tokenizer's, and one that a text of the recipe's begins with
    return [row[int(row[:2] == twice) : len(row) - appended] for row in ids]


def encode_prompts_again(
    template: str,
    conversations: Sequence[Conversation],
    rendered: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    chat_date: str | None = None,
) -> list[list[int]]:
    """Return token ids of prompts for another tokenizer than that of the examples; its control tokens in them are text.

    Unless the template itself writes any of them: then all in what it rendered are meant. A conversation that the
    tokenizer's chat template cannot render has no ids.

    Args:
        template: Of the examples.
        conversations: The prompts before the template; for `chat` the tokenizer's own chat template renders them.
        rendered: As the examples have them.
        tokenizer: The other one.
        chat_date: The date that its chat template prints, where it prints one.

    Raises:
        InputError: `chat`, and the tokenizer has no chat template.
    """
    broken = breaker(tokenizer)
    if template == CHAT:
        chat = ChatTemplate(tokenizer, chat_date)
        rendered = [_prompt(chat, conversation) for conversation in conversations]
    elif broken(template) == template:
        rendered = list(map(broken, rendered))
    return encode_prompts(template, rendered, tokenizer)


def _prompt(chat: ChatTemplate, conversation: Conversation) -> str:
    try:
        return chat.prompt(conversation)
    except NotRenderable:
        return ""


def encode_texts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the token ids of texts after a prompt, or of texts to be cut into chunks, without special tokens."""
    return _encode(texts, tokenizer, add_special_tokens=False)


def encode_targets(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return token ids of continuations without their end; special tokens written in them are text.

    Tokens that are not declared special stay tokens: a model's answers may have them, such as `<think>`.
    """
    return _encode_as_text(texts, tokenizer, special_tokens(tokenizer))


def encode_as_text(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Encode texts that anyone may have written: what looks like a control token in them is text."""
    return _encode_as_text(texts, tokenizer, control_tokens(tokenizer))


def _encode_as_text(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", tokens: Mapping[str, int]
) -> list[list[int]]:
    # The unknown token also represents characters, unless it is one of the others.
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    control = set(tokens.values()) - unknown
    ids = _encode(texts, tokenizer, add_special_tokens=False)
    # Most texts have none: those are encoded as they are.
    held = [
        place
        for place, (text, row) in enumerate(zip(texts, ids, strict=True))
        if not control.isdisjoint(row) or (not unknown.isdisjoint(row) and str(tokenizer.unk_token) in text)
    ]
    split = _encode([texts[place] for place in held], tokenizer, False, split_special_tokens=True)
    for place, row in zip(held, split, strict=True):
        ids[place] = row
    # Some vocabularies hold the strings themselves (Unigram, word-level), and control tokens need not be special.
    left = [place for place in held if not control.isdisjoint(ids[place])]
    broken = _encode(list(map(breaker_of(tokens), (texts[place] for place in left))), tokenizer, False)
    for place, row in zip(left, broken, strict=True):
        # A normalizer may restore a control token from similar characters; then it is removed.
        ids[place] = [token for token in row if token not in control]
    return ids


def without_eos(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a text without EOS tokens written at its end: what encodes it puts one there."""
    end = str(tokenizer.eos_token or "")
    while end.strip() and (stripped := text.rstrip()).endswith(end):
        text = stripped.removesuffix(end)
    return text


def eos_token_id(tokenizer: "PreTrainedTokenizerBase", field: str = "data.tokenizer") -> int:
    """Return the id of the token that ends a text; `field` is where the recipe names the tokenizer, for messages.

    Raises:
        InputError: the tokenizer has none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError(
            f"{field} {tokenizer.name_or_path}: it has no EOS token, so no text can end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _encode(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", add_special_tokens: bool, **settings: bool
) -> list[list[int]]:
    if not texts:
        return []
    # verbose: the warning about lengths is the caller's business, who has limits of its own.
    encoded = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False, **settings
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _appended_tokens(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return how many special tokens the tokenizer puts behind a text."""
    (bare,), (special,) = (_encode(["a"], tokenizer, add_special_tokens=add) for add in (False, True))
    before = next(n for n in range(len(special)) if special[n : n + len(bare)] == bare)
    return len(special) - before - len(bare)
