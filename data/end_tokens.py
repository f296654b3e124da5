"""Which tokens end a text, and a text's tokens without the one that ends it."""

from collections.abc import Sequence


def without_end(token_ids: Sequence[int], ended: bool) -> Sequence[int]:
    """Return the tokens of a continuation without the one that ends it; `ended` says whether it has one.

    A model may end a text with any of several tokens, or run into its limit: two continuations are the same text where
    these tokens are equal.
    """
    return token_ids[:-1] if ended else token_ids
