"""What the judges that cost something would still ask, before they do."""

from collections.abc import Sequence
from dataclasses import dataclass

from cpo_pipe.data.store import Rows
from cpo_pipe.eval.judges.base import Case, Pair, unjudged
from cpo_pipe.eval.judges.openai import OpenAiJudge
from cpo_pipe.pipeline.engines.openai import Tokens

TOKEN_BYTES = 4
"""Bytes of UTF-8 that count as a token: what English text comes to with the tokenizers of large models."""


@dataclass(frozen=True)
class Cost:
    """What is still to be asked of an API."""

    calls: int
    tokens: Tokens
    """Of prompts, estimated; and the most that can be written."""


@dataclass(frozen=True)
class Draft:
    """A pair of which an output may still be missing (None)."""

    case: Case
    output_a: str | None
    output_b: str | None


def cost(judge: OpenAiJudge, drafts: Sequence[Draft], max_new_tokens: int, rows: Rows) -> Cost:
    """What a judge would still ask, and what that takes; a missing output counts as `max_new_tokens` tokens."""
    tokens, pairs = [], []
    for draft in drafts:
        missing = [draft.output_a, draft.output_b].count(None)
        pair = Pair(draft.case, draft.output_a or "", draft.output_b or "")
        if missing:
            tokens += [_asked(judge, pair) + missing * max_new_tokens] * len(judge.orders)
        else:
            pairs.append(pair)
    tokens += [_asked(judge, shown) for shown in unjudged(judge, pairs, rows).values()]
    return Cost(len(tokens), Tokens(sum(tokens), len(tokens) * judge.max_tokens))


def tokens_of(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode()) // TOKEN_BYTES)


def _asked(judge: OpenAiJudge, shown: Pair) -> int:
    return tokens_of((judge.api.config.system or "") + judge.query(shown))
