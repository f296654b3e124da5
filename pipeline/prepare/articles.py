"""Articles, cut into chunks. The first tokens of a chunk are its prompt, the others its target."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cpo_pipe.data.config import Section, Share
from cpo_pipe.data.fingerprint import Spec, example_id
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.control_tokens import finder, special_tokens
from cpo_pipe.data.sources.rows import TEXT_COLUMN, Refusal, Row
from cpo_pipe.pipeline.prepare.base import Data, Encoded, Example, ShortEnd, Texts
from cpo_pipe.pipeline.prepare.rows import batches, check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64
"""Articles that are tokenized together."""


class ArticleColumns(Section):
    """Which column of the source holds the article."""

    target: str = Field(TEXT_COLUMN, description="column with the article")


class Articles(Data):
    """Plain articles, for example a .txt file, cut into chunks of tokens."""

    preset: str = Field("text", description=Data.model_fields["preset"].description)
    columns: ArticleColumns = Field(default_factory=ArticleColumns, description="column mapping")
    chunk_tokens: int = Field(512, ge=2, description="tokens of one chunk, prompt and target")
    prompt_fraction: Share = Field(0.15, description="leading share of a chunk that is the prompt")

    @model_validator(mode="after")
    def _check_lengths(self) -> "Articles":
        prompt = prompt_length(self.chunk_tokens, self.prompt_fraction)
        target = self.chunk_tokens - prompt + 1
        for field, length, limit, part in (
            ("max_prompt_tokens", prompt, self.max_prompt_tokens, "prompts"),
            ("max_target_tokens", target, self.max_target_tokens, "targets (with the EOS token)"),
        ):
            if length > limit:
                raise ValueError(
                    f"{field} is {limit}, but chunk_tokens {self.chunk_tokens} and prompt_fraction "
                    f"{self.prompt_fraction:g} make {part} of {length} tokens; raise it to {length}"
                )
        return self

    def texts(self, row: Row) -> Iterator[Texts | Refusal]:
        """Yield the article."""
        found = check_texts(row, self.columns.model_dump())
        yield found if isinstance(found, Refusal) else Texts(row.source, found["target"])

    def corpus(self, texts: Texts) -> Iterator[str]:
        """Yield the article."""
        yield texts.target

    def rendering(self) -> Spec:
        """Return how articles are cut. No template is applied."""
        return {
            "template": templates.PLAIN,
            "chunk_tokens": self.chunk_tokens,
            "prompt_fraction": self.prompt_fraction,
        }

    def limits(self) -> Spec:
        """Return nothing: chunks are never too long."""
        return {}

    def longest_target(self) -> int:
        """Return the tokens of a whole chunk's target."""
        return self.chunk_tokens - prompt_length(self.chunk_tokens, self.prompt_fraction)

    def encode(
        self,
        rows: Iterator[Texts | Refusal],
        tokenizer: "PreTrainedTokenizerBase",
        rendering: Spec,
    ) -> Iterator[Encoded]:
        """Yield an example for each chunk; refused articles come first in their batch."""
        eos = templates.eos_token_id(tokenizer)
        is_control = finder(special_tokens(tokenizer))
        for batch in batches(rows, BATCH):
            yield from (row for row in batch if isinstance(row, Refusal))
            articles = [row for row in batch if isinstance(row, Texts)]
            encoded = templates.encode_targets([article.target for article in articles], tokenizer)
            for article, ids in zip(articles, encoded, strict=True):
                chunks = list(cut(ids, self.chunk_tokens, self.prompt_fraction))
                for chunk in chunks:
                    sides = (chunk.prompt_ids, chunk.target_ids)
                    prompt, target = (str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in sides)
                    target_ids = [*chunk.target_ids, eos] if chunk.ends else chunk.target_ids
                    row = {
                        "example_id": example_id(prompt, target, ends=chunk.ends), "prompt": prompt,
                        "rendered": prompt, "target": target, "prompt_ids": chunk.prompt_ids,
                        "target_ids": target_ids, "ends": chunk.ends, "category": None, "messages": None,
                        "rejected": None,
                    }  # fmt: skip
                    yield Example(article.source, row, prompt, is_control(prompt) or is_control(target))
                if not chunks or not chunks[-1].ends:
                    yield ShortEnd()


@dataclass(frozen=True)
class Chunk:
    """A stretch of an article's token ids."""

    prompt_ids: list[int]
    target_ids: list[int]
    ends: bool
    """Whether the article ends with it."""


def cut(ids: Sequence[int], chunk_tokens: int, prompt_fraction: float) -> Iterator[Chunk]:
    """Cut an article into chunks of `chunk_tokens` tokens, without gaps; a last one shorter than half is dropped."""
    for start in range(0, len(ids), chunk_tokens):
        chunk = list(ids[start : start + chunk_tokens])
        if len(chunk) < max(2, chunk_tokens / 2):
            return
        prompt = prompt_length(len(chunk), prompt_fraction)
        yield Chunk(chunk[:prompt], chunk[prompt:], start + len(chunk) == len(ids))


def prompt_length(tokens: int, prompt_fraction: float) -> int:
    """Return how many leading tokens of a chunk are its prompt: the share, but at least one token for each side."""
    return min(max(1, round(prompt_fraction * tokens)), tokens - 1)
