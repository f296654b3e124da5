"""Pairs of a prompt and its target: one text each, or a conversation and its last answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cpo_pipe.data.config import Section
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.answers import AnswerEncoder
from cpo_pipe.data.models.chat import ChatTemplate, NotRenderable, content_of, to_json
from cpo_pipe.data.models.control_tokens import breaker, finder, special_tokens
from cpo_pipe.data.sources.rows import TEXT_COLUMN, Refusal, Row, is_encodable
from cpo_pipe.data.sources.source import Source
from cpo_pipe.pipeline.prepare import formats
from cpo_pipe.pipeline.prepare.base import Data, Encoded, Example, Texts
from cpo_pipe.pipeline.prepare.formats import FORMATS, FormatName, Turn, Unusable, with_system
from cpo_pipe.pipeline.prepare.rows import batches, check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024
"""Rows that are tokenized together."""
PAIRS = "pairs"
"""The format of rows whose columns `data.columns` names."""


class PairColumns(Section):
    """Which column of the source holds what."""

    prompt: str = Field("prompt", description="column with the prompt: a text, or messages")
    target: str = Field("target", description="column with the ground-truth answer: a text, or messages")
    context: str | None = Field(None, description="column with extra input, for templates that have a place for it")
    rejected: str | None = Field(None, description="column with a worse answer, or a list of worse answers")
    system: str | None = Field(None, description="column with the system message (of conversations: `system`)")
    category: str | None = Field(None, description="column with a category, kept for reports")


class Pairs(Data):
    """Prompts with their targets, in columns of a file or a Hugging Face data set."""

    columns: PairColumns = Field(default_factory=PairColumns, description="column mapping")
    format: FormatName | None = Field(
        None,
        description="`messages` (OpenAI), `sharegpt`, `alpaca`, `preference` (chosen and rejected), "
        "`prompt-completion`, or `pairs` (the columns that data.columns names); default: by the columns",
    )
    turns: Literal["last", "every"] = Field(
        "last", description="answers of a conversation that are targets: the `last`, or `every` answer, each an example"
    )
    system: str | None = Field(None, description="system message of conversations that have none")
    template: str | None = Field(
        None,
        description="`plain` (the prompt unchanged), `dolly`, `chat` (the tokenizer's chat template), or a text with "
        "{prompt}; default: chat for conversations, otherwise plain",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the chat template, such as {enable_thinking: false}"
    )

    @model_validator(mode="after")
    def _check_template(self) -> "Pairs":
        known = (None, templates.PLAIN, templates.DOLLY, templates.CHAT)
        if self.template not in known and "{prompt}" not in str(self.template):
            raise ValueError(f"template {self.template!r} is not plain, dolly, chat or a text with {{prompt}}")
        if self.template not in (None, templates.CHAT):
            for key in ("system", "chat_template_kwargs"):
                if getattr(self, key):
                    raise ValueError(f"{key} is not used with the template {self.template}; set template: chat")
        return self

    def resolved(self, source: Source) -> "Pairs":
        """Return the section with its format and its template set."""
        name = self.format or self._detected(source)
        conversational = name in ("messages", "sharegpt")
        if self.template is None and name in ("preference", "prompt-completion"):
            conversational = self._has_messages(source, name)
        template = self.template or (templates.CHAT if conversational or self.system else templates.PLAIN)
        if template == templates.CHAT and not isinstance(self.tokenizer, str):
            raise InputError(
                "data.template is chat, but data.tokenizer trains a tokenizer, which has no chat template; "
                "name the tokenizer of a chat model, or set data.template to plain, dolly or a text with {prompt}"
            )
        if self.turns == "every" and name not in ("messages", "sharegpt"):
            raise InputError(f"data.turns is every, but data.format is {name}, whose rows have one answer; remove it")
        return self.model_copy(update={"format": name, "template": template})

    def _detected(self, source: Source) -> str:
        """Return the format that the columns of a source have."""
        if (self.columns.prompt, self.columns.target) != ("prompt", "target"):
            return PAIRS
        columns = {"prompt", "target", TEXT_COLUMN, *(name for one in FORMATS.values() for name in one.columns)}
        rows = source.rows(source.request({}, columns), self.max_rows)
        first = next((row for row in rows if isinstance(row, Row)), None)
        there = [] if first is None else list(first.values)
        if not there or {"prompt", "target"} <= {*there} or there == [TEXT_COLUMN]:
            return PAIRS  # an error of this format names what is missing
        return formats.detect(there, f"{source.key} {source.name}")

    def _has_messages(self, source: Source, name: str) -> bool:
        """Return whether the first usable row of a source has messages."""
        reading = self.model_copy(update={"format": name})
        request = source.request(*reading.columns_read)
        rows = (row for row in source.rows(request, self.max_rows) if isinstance(row, Row))
        found = (texts for row in rows for texts in reading.texts(row) if isinstance(texts, Texts))
        first = next(found, None)
        return first is not None and first.turn is not None

    @property
    def may_have_rejected(self) -> bool:
        """Whether the format is that of preferences, or may turn out to be."""
        columns = self.columns
        detected = self.format is None and (columns.prompt, columns.target) == ("prompt", "target")
        return self.format == "preference" or columns.rejected is not None or detected

    @property
    def columns_read(self) -> tuple[dict[str, str], list[str]]:
        """The columns that the format needs, and those that it reads where they are there."""
        if self.format in (None, PAIRS):
            return super().columns_read
        known, named = FORMATS[self.format], {"system": self.columns.system, "category": self.columns.category}
        required = {**{column: column for column in known.columns}, **{k: v for k, v in named.items() if v is not None}}
        return required, [column for column in known.optional if column not in required.values()]

    def reading(self) -> Spec:
        """Return the columns, the format and which turns are taken."""
        return {**super().reading(), "format": self.format, "turns": self.turns, "system": self.system}

    def texts(self, row: Row) -> Iterator[Texts | Refusal]:
        """Yield the texts of a row: one for each answer with `turns: every`."""
        try:
            if self.format in (None, PAIRS):
                yield self._pair(row)
                return
            turns = list(FORMATS[self.format].read(row.values))
            for turn in turns if self.turns == "every" else turns[-1:]:
                yield self._texts(row, turn, len(turns) > 1)
        except Unusable as error:
            yield Refusal(row.source, error.reason, str(error))

    def _pair(self, row: Row) -> Texts | Refusal:
        """Return the texts, or the turn, of the columns that `data.columns` names."""
        columns = self.columns.model_dump()
        prompt, target, rejected = (row.values.get(columns[key]) for key in ("prompt", "target", "rejected"))
        if isinstance(target, list | tuple):
            prompt = None if columns["prompt"] == columns["target"] else prompt
            return self._texts(row, formats.preference(prompt, target, rejected))
        texts = check_texts(row, {key: column for key, column in columns.items() if key not in ("rejected", "system")})
        if isinstance(texts, Refusal):
            return texts
        pair = Texts(
            row.source, texts["target"], texts.get("prompt", ""), texts.get("context", ""),
            texts.get("category") or None,
        )  # fmt: skip
        answers = formats.texts(rejected, columns["rejected"])
        system = self._system(row)
        turn = Turn(with_system(pair.conversation, system), pair.answer) if system else None
        return replace(pair, turn=turn, rejected=answers)

    def _system(self, row: Row) -> str | None:
        """Return the system message of a row: that of its column, or the recipe's."""
        column = self.columns.system or (None if self.format == PAIRS else "system")
        own = row.values.get(column) if column is not None else None
        return own if isinstance(own, str) and own else self.system

    def _texts(self, row: Row, turn: Turn, several: bool = False) -> Texts | Refusal:
        """Return the texts of a turn, with its system message."""
        category = row.values.get(self.columns.category) if self.columns.category is not None else None
        system = self._system(row)
        conversation = with_system(turn.prompt, system) if system else turn.prompt
        prompts = [content_of(message) for message in conversation.messages]
        target = content_of(turn.answer)
        questions = [content_of(message) for message in turn.prompt.messages if message["role"] == "user"]
        written = [*prompts, target, *map(content_of, turn.rejected)]
        if (broken := next((text for text in written if not is_encodable(text)), None)) is not None:
            return Refusal(row.source, "not UTF-8", broken)
        for part, texts in (("prompt", prompts), ("target", [target])):
            if not any(text.strip() for text in texts):
                return Refusal(row.source, f"empty {part}", "there is no text")
        is_plain = not turn.conversational and not system
        return Texts(
            row.source, target, conversation.text, "", None if category is None else str(category),
            None if is_plain else replace(turn, prompt=conversation), turn.rejected,
            questions[0] if several and questions else "",  # turns of one conversation are in one split
        )  # fmt: skip

    def corpus(self, texts: Texts) -> Iterator[str]:
        """Yield the rendered prompt and the target."""
        yield templates.render(str(self.template), texts.prompt, texts.context)
        yield texts.target

    def rendering(self) -> Spec:
        """Return the template."""
        settings = {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return {"template": self.template, **settings}

    def limits(self) -> Spec:
        """Return the most tokens of prompts and targets."""
        return {"prompt": self.max_prompt_tokens, "target": self.max_target_tokens}

    def longest_target(self) -> int:
        """Return the limit of targets."""
        return self.max_target_tokens

    def encode(
        self, rows: Iterator[Texts | Refusal], tokenizer: "PreTrainedTokenizerBase", rendering: Spec
    ) -> Iterator[Encoded]:
        """Yield an example or a refusal for each row; rows refused on reading come first in their batch."""
        answers = AnswerEncoder(tokenizer, rendering)
        encode = _chat_columns if self.template == templates.CHAT else _text_columns
        is_control = finder(special_tokens(tokenizer))
        for batch in batches(rows, BATCH):
            yield from (row for row in batch if isinstance(row, Refusal))
            pairs = [row for row in batch if isinstance(row, Texts)]
            for pair, found in zip(pairs, encode(pairs, tokenizer, rendering), strict=True):
                if isinstance(found, Refusal):
                    yield found
                    continue
                columns, had_eos = found
                if refusal := self._check(pair, columns):
                    yield refusal
                    continue
                row = {
                    "example_id": pair.example_id, "prompt": pair.full_prompt, **columns, "ends": True,
                    "category": pair.category, "messages": None if pair.turn is None else pair.conversation.to_json(),
                }  # fmt: skip
                rejected = answers.encode([row] * len(pair.rejected), pair.rejected, self.max_target_tokens)
                if problem := next((one.problem for one in rejected if one.problem), ""):
                    yield Refusal(pair.source, "rejected answer not renderable", problem, pair.example_id)
                    continue
                encoded = [
                    {"text": one.text, "token_ids": one.token_ids, "ends": one.ends,
                     "message": None if one.message is None else to_json(one.message)}
                    for one in rejected
                ]  # fmt: skip
                row["rejected"] = encoded or None
                has_control = any(map(is_control, (pair.full_prompt, columns["target"])))
                yield Example(pair.source, row, pair.row or pair.full_prompt, has_control, had_eos)

    def _check(self, pair: Texts, columns: Mapping[str, Any]) -> Refusal | None:
        """Return the refusal of a pair that exceeds a limit."""
        for part, limit in (("prompt", self.max_prompt_tokens), ("target", self.max_target_tokens)):
            length = len(columns[f"{part}_ids"])
            if length > limit:
                detail = f"{length} tokens, more than data.max_{part}_tokens {limit}"
                return Refusal(pair.source, f"{part} too long", detail, pair.example_id)
        return None


def _text_columns(
    pairs: Sequence[Texts], tokenizer: "PreTrainedTokenizerBase", rendering: Spec
) -> Iterator[tuple[dict[str, Any], bool] | Refusal]:
    """Yield the columns of each pair, whose prompt and target are tokenized apart, and whether an EOS was written."""
    template = str(rendering["template"])
    as_text = breaker(tokenizer)  # control tokens in the data are text; those of the template are meant
    eos = templates.eos_token_id(tokenizer)
    rendered = [templates.render(template, as_text(pair.prompt), as_text(pair.context)) for pair in pairs]
    targets = [templates.without_eos(pair.target, tokenizer) for pair in pairs]
    encoded = zip(
        pairs, rendered, targets, templates.encode_prompts(template, rendered, tokenizer),
        templates.encode_targets(targets, tokenizer), strict=True,
    )  # fmt: skip
    for pair, text, target, prompt_ids, target_ids in encoded:
        if pair.turn is not None:
            roles = ", ".join(str(message["role"]) for message in pair.conversation.messages)
            detail = f"the messages before the answer ({roles}) need data.template: chat"
            yield Refusal(pair.source, "conversation", detail, pair.example_id)
        elif not prompt_ids or not target_ids:  # a tokenizer may drop characters
            part, content = ("prompt", text) if not prompt_ids else ("target", target)
            yield Refusal(pair.source, f"empty {part}", content, pair.example_id)
        else:
            columns = {"rendered": text, "target": target, "prompt_ids": prompt_ids, "target_ids": [*target_ids, eos]}
            yield columns, target != pair.target


def _chat_columns(
    pairs: Sequence[Texts], tokenizer: "PreTrainedTokenizerBase", rendering: Spec
) -> Iterator[tuple[dict[str, Any], bool] | Refusal]:
    """Yield the columns of each pair, rendered as one conversation, and whether an end token was written."""
    chat = ChatTemplate.of(tokenizer, rendering)
    for pair in pairs:
        answer = chat.without_end(pair.answer)
        try:
            rendered, prompt_ids, target_ids = chat.encode(pair.conversation, answer)
        except NotRenderable as error:
            yield Refusal(pair.source, error.reason, str(error), pair.example_id)
            continue
        target = chat.text_of(answer, target_ids)
        columns = {"rendered": rendered, "target": target, "message": to_json(answer), "prompt_ids": prompt_ids,
                   "target_ids": target_ids}  # fmt: skip
        yield columns, answer["content"] != (pair.answer.get("content") or "")
