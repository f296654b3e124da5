"""The `data` section of a recipe, and what each preset implements."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from cpo_pipe.data.config import Location, Name, Positive, Section, Seed, Share
from cpo_pipe.data.fingerprint import Spec, example_id
from cpo_pipe.data.models.chat import Conversation, Message, to_json
from cpo_pipe.data.models.templates import with_context
from cpo_pipe.data.models.train_tokenizer import TrainedTokenizer
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.sources.rows import Refusal, Row
from cpo_pipe.data.sources.source import Source
from cpo_pipe.pipeline.prepare.formats import Turn
from cpo_pipe.pipeline.prepare.source_settings import MixedSource, SplitSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Texts:
    """What a row holds that passed all rules that need no tokenizer. An article is a target with an empty prompt."""

    source: str
    """Where the row is: `file:line`."""
    target: str
    prompt: str = ""
    context: str = ""
    category: str | None = None
    turn: Turn | None = None
    """The messages of a row that has some; otherwise prompt, context and target are all there is."""
    rejected: Sequence[Message] = ()
    """Answers that are worse than the target."""
    row: str = ""
    """What identifies the row that a turn is from, for the split; empty: the prompt."""

    @property
    def example_id(self) -> str:
        """Hash of the texts."""
        if self.turn is None:
            return example_id(self.prompt, self.target, context=self.context)
        return example_id(self.turn.prompt.to_json(), to_json(self.turn.answer))

    @property
    def full_prompt(self) -> str:
        """The prompt with its context."""
        return with_context(self.prompt, self.context)

    @property
    def conversation(self) -> Conversation:
        """The messages before the target."""
        return Conversation.of_text(self.full_prompt) if self.turn is None else self.turn.prompt

    @property
    def answer(self) -> Message:
        """The target as a message."""
        return {"role": "assistant", "content": self.target} if self.turn is None else self.turn.answer


@dataclass(frozen=True)
class Example:
    """An encoded example and where it is from."""

    source: str
    row: Mapping[str, Any]
    """A row of the schema EXAMPLES, without its split."""
    split_key: str
    """Examples with the same key are in the same split."""
    has_control_tokens: bool = False
    """Whether control tokens are written in its texts."""
    had_eos: bool = False
    """Whether an EOS token was written at the end of its target."""


@dataclass(frozen=True)
class ShortEnd:
    """The end of an article, or all of a short one, that is too short for a chunk. It is counted, not rejected."""


Encoded = Example | ShortEnd | Refusal


class Data(Section):
    """Where ground truth comes from, how it becomes token ids and how it is split. The base class of all presets.

    Plain pairs are `Pairs`, plain articles `Articles`. A preset for a data set derives from one of them. It overrides
    defaults of fields (source, columns, template; test_source, if the data set has official splits) and, if the data
    set has its own split, `split_sizes`.
    """

    preset: str = Field(
        "pairs",
        description="`pairs` (prompts and targets, the default), `text` (articles, cut into chunks), a known data set "
        "(`dolly`, `gsm8k`, `python-docs`), or your own as `module:Class`",
    )
    source: Location | None = Field(
        None,
        description="a .jsonl, .json, .csv, .tsv, .parquet or .txt file (also .gz, .zst), a pattern, a folder, a URL "
        "(hf://, s3://, https://, …) or a Hugging Face data set",
    )
    sources: dict[Name, MixedSource] = Field(
        default_factory=dict, description="several sources by name, in place of source; examples record the name"
    )
    subset: str | None = Field(None, description="configuration name of a Hugging Face data set")
    source_split: str | None = Field(
        None, description="split of a folder or a Hugging Face data set to read (default: train)"
    )
    revision: str | None = Field(None, description="commit or tag of a Hugging Face data set")
    validation_source: Location | SplitSource | None = Field(
        None, description="official validation split: a location, or settings such as {source_split: validation}"
    )
    test_source: Location | SplitSource | None = Field(
        None, description="official test split: a location, or settings such as {source_split: test}"
    )
    columns: Section = Field(default_factory=Section, description="column mapping")
    tokenizer: Location | TrainedTokenizer = Field(
        description="a folder or hub name, or {vocab_size: N} to train one on the data"
    )
    max_rows: Positive | None = Field(None, description="rows to read at most (default: all)")
    train: Positive | None = Field(None, description="training examples (default: what is left)")
    validation: int = Field(0, ge=0, description="validation examples (of validation_source, by default all)")
    test: Positive | None = Field(None, description="test examples (default: what is left; of test_source, all)")
    split_seed: Seed = Field(0, description="seed of the split; it orders rows by hash(split_seed, prompt)")
    near_duplicates: Literal["group", "drop", "keep"] = Field(
        "group",
        description="near-duplicate prompts: `group` (all in one split), `drop` (only the first is kept), or `keep`",
    )
    near_duplicate_similarity: float = Field(
        0.5,
        ge=0.3,
        le=1,
        description="smallest Jaccard similarity of near-duplicates, of their sets of two-word phrases",
    )
    drop_leaks: bool = Field(False, description="remove training examples that overlap with validation or test ones")
    max_prompt_tokens: Positive = Field(512, description="longest prompt, in tokens; longer rows are rejected")
    max_target_tokens: Positive = Field(512, description="longest target, in tokens; longer rows are rejected")
    max_rejected: Share = Field(0.1, description="largest share of rows that may be rejected before it is an error")

    @model_validator(mode="after")
    def _check_source(self) -> "Data":
        if self.source is None and not self.sources:
            raise ValueError("source is missing: name a file or a Hugging Face data set")
        if not self.sources:
            return self
        for key in ("source", "subset", "source_split", "revision", "max_rows"):
            if key in self.model_fields_set and getattr(self, key) is not None:
                raise ValueError(f"{key} is not used with sources; set it in the sources, or remove it")
        if len({one.weight is None for one in self.sources.values()}) > 1:
            raise ValueError("sources: give a weight to all of them or to none")
        for key in ("validation_source", "test_source"):
            given = getattr(self, key)
            if isinstance(given, SplitSource) and given.source is None:
                raise ValueError(f"{key}.source is missing: name one, since there are several sources")
        return self

    @model_validator(mode="after")
    def _check_split(self) -> "Data":
        train, _, test = self.split_sizes()
        if train is None and test is None and self.test_source is None:
            raise ValueError("train or test must be given: they say where the split is")
        return self

    # ── what a preset may override ───────────────────────────────────────────────────────────────────────────────

    def open_source(self) -> Source:
        """Return what rows are read from.

        Raises:
            InputError: the source does not exist.
        """
        assert self.source is not None  # validated
        return locate_source(self.source, subset=self.subset, split=self.source_split, revision=self.revision)

    def split_sizes(self) -> tuple[int | None, int, int | None]:
        """Return the sizes of the train, validation and test splits; None: what is left."""
        return self.train, self.validation, self.test

    # ── what the shape of the data (pairs, articles) decides ─────────────────────────────────────────────────────

    def resolved(self, source: Source) -> Self:
        """Return the section with what depends on the source's columns filled in.

        Raises:
            InputError: the source has not the columns of any known format.
        """
        return self

    @property
    def columns_read(self) -> tuple[dict[str, str], list[str]]:
        """The columns that the source must have, by the key of `data.columns` that names them, and optional ones.

        Those with prompts and targets must be there, and those that the user names.
        """
        named = {field: column for field, column in self.columns.model_dump().items() if column is not None}
        must = {"prompt", "target"} | self.columns.model_fields_set
        required = {field: column for field, column in named.items() if field in must}
        return required, [column for field, column in named.items() if field not in must]

    @property
    def may_have_rejected(self) -> bool:
        """Whether the rows may have rejected answers, as far as the section tells."""
        return False

    def reading(self) -> Spec:
        """Return what decides the texts of a row."""
        return {"columns": self.columns.model_dump()}

    @abstractmethod
    def texts(self, row: Row) -> Iterator[Texts | Refusal]:
        """Yield the texts of a row, or the rule that it breaks."""

    @abstractmethod
    def corpus(self, texts: Texts) -> Iterator[str]:
        """Yield the texts of a row that a tokenizer is trained on."""

    @abstractmethod
    def rendering(self) -> Spec:
        """Return what decides an example's token ids besides its texts and the tokenizer; it has a `template`."""

    @abstractmethod
    def limits(self) -> Spec:
        """Return what else decides which rows are rejected."""

    @abstractmethod
    def longest_target(self) -> int:
        """Return the most tokens of a target without its EOS: the default limit of continuations."""

    @abstractmethod
    def encode(
        self,
        rows: Iterator[Texts | Refusal],
        tokenizer: "PreTrainedTokenizerBase",
        rendering: Spec,
    ) -> Iterator[Encoded]:
        """Yield the examples of rows.

        Args:
            rows: the rows of the source; refused ones are passed on.
            tokenizer: the tokenizer.
            rendering: of the examples, with the date of a chat template that has one.
        """
