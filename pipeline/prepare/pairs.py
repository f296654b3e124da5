"""Pairs of a prompt and its target: rendered by a template and tokenized apart."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cpo_pipe.data.config import Section
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.sources.rows import Refusal
from cpo_pipe.pipeline.prepare.base import Data, Encoded, Example, Texts
from cpo_pipe.pipeline.prepare.rows import batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024
"""Rows that are tokenized together."""


class PairColumns(Section):
    """Which column of the source holds what."""

    prompt: str = Field("prompt", description="column with the prompt")
    target: str = Field("target", description="column with the ground-truth continuation")
    context: str | None = Field(None, description="column with extra input, for templates that have a place for it")
    category: str | None = Field(None, description="column with a category, kept for reports")


class Pairs(Data):
    """Prompts with their targets, in columns of a file or a Hugging Face data set."""

    columns: PairColumns = Field(default_factory=PairColumns, description="column mapping")
    template: str = Field(
        "plain",
        description="`plain` (the prompt unchanged), `dolly`, `chat` (the tokenizer's own), or a text with {prompt}",
    )

    @model_validator(mode="after")
    def _check_template(self) -> "Pairs":
        if self.template not in (templates.PLAIN, templates.DOLLY, templates.CHAT) and "{prompt}" not in self.template:
            raise ValueError(f"template {self.template!r} is not plain, dolly, chat or a text with {{prompt}}")
        return self

    def corpus(self, texts: Texts) -> Iterator[str]:
        """Yield the rendered prompt and the target."""
        yield templates.render(self.template, texts.prompt, texts.context)
        yield texts.target

    def rendering(self) -> Spec:
        """Return the template."""
        return {"template": self.template}

    def limits(self) -> Spec:
        """Return the most tokens of prompts and targets."""
        return {"prompt": self.max_prompt_tokens, "target": self.max_target_tokens}

    def longest_target(self) -> int:
        """Return the limit of targets."""
        return self.max_target_tokens

    def encode(
        self,
        rows: Iterator[Texts | Refusal],
        tokenizer: "PreTrainedTokenizerBase",
        rendering: Spec,
        advance: Callable[[int], None],
    ) -> Iterator[Encoded]:
        """Yield an example or a refusal for each row; rows refused on reading come first in their batch."""
        as_text = templates.breaker(tokenizer)  # control tokens in the data are text; those of the template are meant
        eos = templates.eos_token_id(tokenizer)
        is_control = templates.finder(templates.special_tokens(tokenizer))
        for batch in batches(rows, BATCH):
            yield from (row for row in batch if isinstance(row, Refusal))
            given = [row for row in batch if isinstance(row, Texts)]
            pairs = [replace(pair, target=templates.without_eos(pair.target, tokenizer)) for pair in given]
            prompts = [(as_text(pair.prompt), as_text(pair.context)) for pair in pairs]
            day = rendering.get("chat_date")
            rendered = [templates.render(self.template, *texts, tokenizer, day) for texts in prompts]
            all_prompt_ids = templates.encode_prompts(self.template, rendered, tokenizer)
            all_target_ids = templates.encode_targets([pair.target for pair in pairs], tokenizer)
            columns = zip(given, pairs, prompts, rendered, all_prompt_ids, all_target_ids, strict=True)
            for written, pair, prompt, text, prompt_ids, target_ids in columns:
                if not prompt_ids or not target_ids:  # a tokenizer may drop characters
                    part, content = ("prompt", text) if not prompt_ids else ("target", pair.target)
                    yield Refusal(pair.source, f"empty {part}", content, pair.example_id)
                    continue
                target_ids = [*target_ids, eos]
                if refusal := self._too_long(pair, prompt_ids, target_ids):
                    yield refusal
                    continue
                row = {
                    "example_id": pair.example_id, "prompt": pair.full_prompt, "rendered": text,
                    "target": pair.target, "prompt_ids": prompt_ids, "target_ids": target_ids, "ends": True,
                    "category": pair.category,
                }  # fmt: skip
                has_control_tokens = prompt != (pair.prompt, pair.context) or is_control(pair.target)
                yield Example(pair.source, row, has_control_tokens, had_eos=pair.target != written.target)
            advance(len(batch))

    def _too_long(self, pair: Texts, prompt_ids: list[int], target_ids: list[int]) -> Refusal | None:
        """Return the refusal of a pair that exceeds a limit."""
        for part, ids, limit in (
            ("prompt", prompt_ids, self.max_prompt_tokens), ("target", target_ids, self.max_target_tokens)
        ):  # fmt: skip
            if len(ids) > limit:
                detail = f"{len(ids)} tokens, more than data.max_{part}_tokens {limit}"
                return Refusal(pair.source, f"{part} too long", detail, pair.example_id)
        return None
