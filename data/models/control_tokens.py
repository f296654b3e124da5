"""Tokens that mean something else than their text, and texts that contain them."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return ids by text of the tokens that are declared special.

    Without characters that have no other token as text, but for BOS and EOS: some tokenizers declare a character of
    ordinary texts as their padding (`!`).
    """
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found |= {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for text, token_id in [*found.items()]:
        is_character = len(text) == 1 and token_id not in ends
        if not text.strip() or (
            is_character
            and [token_id] == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ):
            del found[text]
    return found


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the ids of tokens that mean something else than their text: special ones, and marks of a chat template.

    Not all marks of a conversation are declared special: DeepSeek's `<｜User｜>` is not.
    """
    written = str(tokenizer.chat_template or "")
    marks = {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and token.content in written and not token.content.isalnum()
    }
    return special_tokens(tokenizer) | marks


def finder(tokens: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a text contains any of the tokens."""
    pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
    return lambda text: pattern.search(text) is not None


def breaker(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], str]:
    """Return a function that breaks the control tokens in a text by a space after the first character: `< |im_end|>`.

    For texts between control tokens that the template writes. A control token of one character becomes a space.
    """
    return breaker_of(control_tokens(tokenizer))


def breaker_of(tokens: Iterable[str]) -> Callable[[str], str]:
    """Return a function that breaks these tokens in a text by a space after the first character."""
    # What follows the first character is looked at and not taken, since tokens may overlap.
    pattern = re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in tokens) or r"(?!)")
    return lambda text: pattern.sub(lambda first: " " if first[0] in tokens else f"{first[0]} ", text)
