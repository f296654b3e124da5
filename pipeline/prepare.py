"""prepare: read ground truth, render and tokenize it, refuse what breaks a rule, split it; makes `examples`."""

import logging
import reprlib
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cpo_pipe.data import templates
from cpo_pipe.data.chat_date import chat_date
from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, Spec, digest, example_id
from cpo_pipe.data.models import TokenizerFiles, locate_tokenizer
from cpo_pipe.data.progress import Meter, track
from cpo_pipe.data.readers import PYTHON_DOCS, TEXT_COLUMN, Refusal, Row, Source, is_encodable, locate_source
from cpo_pipe.data.recipe import Data, TrainedTokenizer
from cpo_pipe.data.schemas import EXAMPLES, REJECTED
from cpo_pipe.data.store import Store
from cpo_pipe.data.text import one_line
from cpo_pipe.data.tokenizers import TrainedBPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
DEFINITIONS = 2
"""Raise when the same rows come to mean other examples: what was prepared in the old way is then made again."""
BATCH = 1024
"""Rows that are tokenized together, and rows of a written row group."""
NAMED_REASONS = 3
"""Reasons of which a row is shown when too many rows are rejected."""
ARTICLE_BATCH = 64
"""Articles that are tokenized together."""

_CUT = ("text", "python-docs")
"""Presets whose examples are cut from articles."""
_PRESETS: dict[str, dict[str, Any]] = {
    "dolly": {
        "source": "databricks/databricks-dolly-15k",
        "columns": {"prompt": "instruction", "target": "response", "context": "context", "category": "category"},
        "template": templates.DOLLY,
    },
    "gsm8k": {
        "source": "openai/gsm8k",
        "subset": "main",
        "columns": {"prompt": "question", "target": "answer"},
        "template": "Question: {prompt}\nAnswer:\n",
    },
    "text": {"columns": {"target": TEXT_COLUMN}},
    "python-docs": {"columns": {"target": TEXT_COLUMN}},
}
_DOLLY_SPLIT = {"train": 7505, "test": 7506}
"""The paper's."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Pair:
    """A row that passed all rules that need no tokenizer."""

    source: str
    prompt: str
    context: str
    target: str
    category: str | None

    @property
    def example_id(self) -> str:
        return example_id(self.prompt, self.target, context=self.context)

    @property
    def full_prompt(self) -> str:
        return templates.with_context(self.prompt, self.context)


def prepare(config: Data, store: Store, run_dir: Path | None = None) -> Examples:
    """Make the examples that a recipe's `data` section describes, or find them in the store.

    Args:
        config: the section.
        store: where the examples are kept.
        run_dir: where `rejected.parquet` is left to look at when no examples are made; None: nowhere.

    Raises:
        InputError: a setting or the source breaks a rule, or more than `max_rejected` of the rows do.
    """
    plan = _Plan(config, store)
    examples = plan.found()
    if examples is not None:
        _report(examples.product.manifest, f" (found in {examples.product.name})")
        return examples
    plan.check_source()
    examples = plan.examples(plan.tokenizer())
    with examples.product.lock():
        if examples.product.complete():  # another process made them while we waited
            plan.check(examples)
        else:
            _make(examples, plan.config, plan.rows, run_dir)
    _report(examples.product.manifest)
    return examples


def find_examples(config: Data, store: Store) -> Examples | None:
    """The examples that a recipe's `data` section describes, where the store has them.

    Raises:
        InputError: as `prepare` does.
    """
    return _Plan(config, store).found()


class _Plan:
    """Which rows a `data` section means, and where what is made of them is kept."""

    def __init__(self, config: Data, store: Store):
        self.config = with_preset(config)
        self.store = store
        required = {"prompt", "target"} | config.columns.model_fields_set
        if self.config.preset in _CUT:
            _check_cut(self.config)
            required = {"target"}
        self.rows = _Rows(_source(self.config), self.config, required)
        self._content = _content(self.config, self.rows.source, store)

    def found(self) -> Examples | None:
        """The examples, where they and their tokenizer are there; makes nothing."""
        tokenizer = self._bpe().found() if isinstance(self.config.tokenizer, TrainedTokenizer) else self.tokenizer()
        if tokenizer is None:
            return None
        examples = self.examples(tokenizer)
        if not examples.product.complete():
            return None
        self.check(examples)
        return examples

    def check_source(self) -> None:
        """Refuse a damaged source before it is read."""
        self.rows.source.check(self._content["source"])

    def check(self, examples: Examples) -> None:
        """Refuse examples that were made with a higher `max_rejected` than this section allows."""
        facts = examples.product.manifest
        if not facts["rejected"]:
            return
        file = examples.product.path / "rejected.parquet"
        rejected = pq.read_table(file, columns=["source", "reason", "detail"]).to_pylist()
        kept = sum(facts["examples"].values()) + facts["left_over"]
        _check_rejected(self.config.max_rejected, self.rows.source.name, facts["rejected"], kept, rejected, file)

    def tokenizer(self) -> TokenizerFiles:
        """The tokenizer, trained where it has to be."""
        if isinstance(self.config.tokenizer, str):
            return locate_tokenizer(self.config.tokenizer, self.store)
        return self._bpe().trained(self.rows.texts())

    def examples(self, tokenizer: TokenizerFiles) -> Examples:
        """The examples, made or not."""
        rendering: Spec = {
            "template": self.config.template, "tokenizer": tokenizer.fingerprint, "special_tokens": "as text",
        }  # fmt: skip
        if self.config.template == templates.CHAT and (day := chat_date(tokenizer, self.store)):
            rendering["chat_date"] = day
        split = {"seed": self.config.split_seed, **{name: getattr(self.config, name) for name in SPLITS}}
        spec: Spec = {**self._content, "definitions": DEFINITIONS, "rendering": rendering, "split": split}
        if self.config.preset in _CUT:
            rendering |= {"piece_tokens": self.config.piece_tokens, "prompt_share": self.config.prompt_share}
        else:  # pieces are never too long
            spec["limits"] = {"prompt": self.config.max_prompt_tokens, "target": self.config.max_target_tokens}
        return Examples(self.store.product("examples", spec), tokenizer, rendering)

    def _bpe(self) -> TrainedBPE:
        assert isinstance(self.config.tokenizer, TrainedTokenizer)
        corpus = {**self._content, "template": self.config.template}
        return TrainedBPE(corpus, self.config.tokenizer.vocab_size, self.store)


def with_preset(config: Data) -> Data:
    """The section with its preset's values in all fields that the user left out."""
    if config.preset is None:
        return config
    preset = _PRESETS[config.preset]
    if config.source is not None:
        preset = {field: value for field, value in preset.items() if field != "subset"}
    if config.preset == "dolly" and config.train is None and config.test is None:
        preset = preset | _DOLLY_SPLIT
    given = config.model_dump(exclude_unset=True)
    columns = preset["columns"] | given.get("columns", {})
    return Data.model_validate(preset | given | {"columns": columns})


def _check_cut(config: Data) -> None:
    if config.template != templates.PLAIN:
        raise InputError(
            f"data.template has no meaning for the preset {config.preset}, which cuts articles: leave it out"
        )
    prompt = prompt_length(config.piece_tokens, config.prompt_share)
    lengths = {"max_prompt_tokens": prompt, "max_target_tokens": config.piece_tokens - prompt + 1}
    for field, length in lengths.items():
        if length > getattr(config, field):
            part = "prompts" if field == "max_prompt_tokens" else "targets (with the EOS token)"
            raise InputError(
                f"data.{field} is {getattr(config, field)}, but data.piece_tokens {config.piece_tokens} and "
                f"data.prompt_share {config.prompt_share:g} make {part} of {length} tokens: raise it to that"
            )


def _source(config: Data) -> Source:
    if config.preset == PYTHON_DOCS:
        return Source(PYTHON_DOCS, PYTHON_DOCS)
    assert config.source is not None  # the section's own validation and the presets see to it
    return locate_source(config.source, config.subset, config.source_split, config.revision)


def _content(config: Data, source: Source, store: Store) -> Spec:
    """What decides the texts."""
    is_cut = config.preset in _CUT
    columns = {"target": config.columns.target} if is_cut else config.columns.model_dump()
    return {"source": source.identity(store.hash_file), "columns": columns, "max_rows": config.max_rows, "cut": is_cut}


class _Rows:
    """The rows of the source, checked by all rules that need no tokenizer."""

    def __init__(self, source: Source, config: Data, required: Collection[str]):
        self.source = source
        self.config = config
        named = {field: column for field, column in config.columns.model_dump().items() if column is not None}
        self._required = {field: column for field, column in named.items() if field in required}
        self._optional = [column for field, column in named.items() if field not in required]

    def count(self) -> int:
        """Rows that will be read."""
        count = self.source.count()
        return count if self.config.max_rows is None else min(count, self.config.max_rows)

    def checked(self) -> Iterator[_Pair | Refusal]:
        """The rows in the order of the source; an article is a pair with an empty prompt."""
        for row in self.source.read(self._required, self._optional, self.config.max_rows):
            yield row if isinstance(row, Refusal) else self._check(row)

    def texts(self) -> Iterator[str]:
        """The corpus that a tokenizer is trained on: rendered prompts and targets."""
        for row in self.checked():
            if isinstance(row, _Pair):
                if row.prompt:
                    yield templates.render(self.config.template, row.prompt, row.context)
                yield row.target

    def _check(self, row: Row) -> _Pair | Refusal:
        columns = self.config.columns
        is_cut = self.config.preset in _CUT
        fields = ["target"] if is_cut else ["prompt", "target", "context", "category"]
        texts: dict[str, str] = {}
        for field in fields:
            value = row.values.get(getattr(columns, field))
            if value is None and field in ("prompt", "target"):
                return Refusal(row.source, "missing field", self._column(field))
            if field == "category" and isinstance(value, int | float | Decimal):
                value = str(value)
            if value is not None and not isinstance(value, str):
                detail = f"{self._column(field)} has type {type(value).__name__}: {reprlib.repr(value)}"
                return Refusal(row.source, "not text", detail)
            if value is not None and not is_encodable(value):
                return Refusal(row.source, "not UTF-8", f"{self._column(field)} is {value}")
            if value is not None:
                texts[field] = value
        for field in ("prompt", "target"):
            if field in texts and not texts[field].strip():
                return Refusal(row.source, f"empty {field}", f"{self._column(field)} is {texts[field]!r}")
        category = texts.get("category") or None
        return _Pair(row.source, texts.get("prompt", ""), texts.get("context", ""), texts["target"], category)

    def _column(self, field: str) -> str:
        """Return a column as messages name it: by its name, and the key of the recipe that names it."""
        return f"column {getattr(self.config.columns, field)} (data.columns.{field})"


def _make(examples: Examples, config: Data, rows: _Rows, run_dir: Path | None) -> None:
    tokenizer = examples.tokenizer.load()
    templates.eos_token_id(tokenizer)  # an error now, not after the work
    with examples.product.create() as writer:
        collected = _Collected(rows.source.name, config.split_seed, writer.path / "unordered.arrow")
        with track("prepare", rows.count()) as meter, collected:
            make = _cut_articles if config.preset in _CUT else _encode_pairs
            for made in make(rows, tokenizer, examples.rendering, meter):
                collected.add(made)
        collected.check(config.max_rejected, run_dir)
        ends = split_ends(collected.prompt_hashes(), config.train, config.validation, config.test)
        collected.write(writer.path, ends)
        _warn_of_short_splits(config, ends)
        _copy_tokenizer(examples.tokenizer.path, writer.path / "tokenizer")
        writer.facts["rows_read"] = meter.done
        writer.facts["examples"] = {name: end - start for name, start, end in _ranges(ends)}
        writer.facts["left_over"] = len(collected.keys) - ends[-1]
        writer.facts["rejected"] = dict(collected.reasons.most_common())
        writer.facts["short_ends"] = collected.short_ends
        writer.facts["control_tokens"] = collected.control_tokens
        writer.facts["written_ends"] = collected.written_ends


@dataclass(frozen=True)
class _Made:
    """An example and where it came from."""

    source: str
    example: dict[str, Any]
    """A row of `examples`, but for its split."""
    control_tokens: bool
    """Whether control tokens are written in its texts."""
    written_end: bool = False
    """Whether an EOS token was written at the end of its target."""


@dataclass(frozen=True)
class _ShortEnd:
    """The end of an article, or all of a short one, that makes no piece: counted, but nothing is wrong with it."""


def _encode_pairs(
    rows: _Rows, tokenizer: "PreTrainedTokenizerBase", rendering: Spec, meter: Meter
) -> Iterator[_Made | Refusal]:
    template, eos = rows.config.template, templates.eos_token_id(tokenizer)
    as_text = templates.breaker(tokenizer)  # what is written in the data; the template's own control tokens are meant
    in_target = templates.finder(templates.special_tokens(tokenizer))
    for batch in _batches(rows.checked(), BATCH):
        yield from (row for row in batch if isinstance(row, Refusal))
        given = [row for row in batch if isinstance(row, _Pair)]
        pairs = [replace(pair, target=templates.without_eos(pair.target, tokenizer)) for pair in given]
        prompts = [(as_text(pair.prompt), as_text(pair.context)) for pair in pairs]
        rendered = [templates.render(template, *texts, tokenizer, rendering.get("chat_date")) for texts in prompts]
        all_prompt_ids = templates.encode_prompts(template, rendered, tokenizer)
        all_target_ids = templates.encode_targets([pair.target for pair in pairs], tokenizer)
        columns = zip(given, pairs, prompts, rendered, all_prompt_ids, all_target_ids, strict=True)
        for source, pair, prompt, text, prompt_ids, target_ids in columns:
            made = _encoded(pair, text, prompt_ids, target_ids, eos, rows.config)
            if isinstance(made, _Made):
                control = prompt != (pair.prompt, pair.context) or in_target(pair.target)
                made = replace(made, control_tokens=control, written_end=pair.target != source.target)
            yield made
        meter.advance(len(batch))


def _encoded(
    pair: _Pair, rendered: str, prompt_ids: list[int], target_ids: list[int], eos: int, config: Data
) -> _Made | Refusal:
    if not prompt_ids or not target_ids:  # a tokenizer may drop characters
        part, text = ("prompt", rendered) if not prompt_ids else ("target", pair.target)
        return Refusal(pair.source, f"empty {part}", text, pair.example_id)
    target_ids = [*target_ids, eos]
    limits = {"prompt": config.max_prompt_tokens, "target": config.max_target_tokens}
    for (part, limit), ids in zip(limits.items(), (prompt_ids, target_ids), strict=True):
        if len(ids) > limit:
            detail = f"{len(ids)} tokens, more than data.max_{part}_tokens {limit}"
            return Refusal(pair.source, f"{part} too long", detail, pair.example_id)
    example: dict[str, Any] = {
        "example_id": pair.example_id, "prompt": pair.full_prompt, "rendered": rendered, "target": pair.target,
        "prompt_ids": prompt_ids, "target_ids": target_ids, "ends": True, "category": pair.category,
    }  # fmt: skip
    return _Made(pair.source, example, control_tokens=False)


def _cut_articles(
    rows: _Rows, tokenizer: "PreTrainedTokenizerBase", _: Spec, meter: Meter
) -> Iterator[_Made | _ShortEnd | Refusal]:
    for batch in _batches(rows.checked(), ARTICLE_BATCH):
        yield from (row for row in batch if isinstance(row, Refusal))
        articles = [row for row in batch if isinstance(row, _Pair)]
        encoded = templates.encode_targets([article.target for article in articles], tokenizer)
        for article, ids in zip(articles, encoded, strict=True):
            pieces = list(cut(ids, rows.config.piece_tokens, rows.config.prompt_share))
            yield from _decoded(article.source, pieces, tokenizer)
            if not pieces or not pieces[-1].ends:
                yield _ShortEnd()
        meter.advance(len(batch))


def _decoded(source: str, pieces: Sequence["Piece"], tokenizer: "PreTrainedTokenizerBase") -> Iterator[_Made]:
    eos, is_control = templates.eos_token_id(tokenizer), templates.finder(templates.special_tokens(tokenizer))
    for piece in pieces:
        sides = (piece.prompt_ids, piece.target_ids)
        prompt, target = (str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in sides)
        target_ids = [*piece.target_ids, eos] if piece.ends else piece.target_ids
        example: dict[str, Any] = {
            "example_id": example_id(prompt, target, ends=piece.ends), "prompt": prompt, "rendered": prompt,
            "target": target, "prompt_ids": piece.prompt_ids, "target_ids": target_ids, "ends": piece.ends,
            "category": None,
        }  # fmt: skip
        yield _Made(source, example, control_tokens=is_control(prompt) or is_control(target))


@dataclass(frozen=True)
class Piece:
    """A stretch of an article's token ids."""

    prompt_ids: list[int]
    target_ids: list[int]
    ends: bool
    """Whether the article ends with it."""


def cut(ids: Sequence[int], piece_tokens: int, prompt_share: float) -> Iterator[Piece]:
    """Cut an article into pieces of `piece_tokens` tokens, without gaps; a last one shorter than half is dropped."""
    for start in range(0, len(ids), piece_tokens):
        piece = list(ids[start : start + piece_tokens])
        if len(piece) < max(2, piece_tokens / 2):
            return
        prompt = prompt_length(len(piece), prompt_share)
        yield Piece(piece[:prompt], piece[prompt:], start + len(piece) == len(ids))


def prompt_length(tokens: int, prompt_share: float) -> int:
    """How many leading tokens of a piece are its prompt: the share, but at least one token for each side."""
    return min(max(1, round(prompt_share * tokens)), tokens - 1)


def target_tokens(config: Data) -> int:
    """The most tokens of a target but for its EOS: what continuations are limited to unless told otherwise."""
    if config.preset in _CUT:
        return config.piece_tokens - prompt_length(config.piece_tokens, config.prompt_share)
    return config.max_target_tokens


class _Collected:
    """What became of the rows: examples in a scratch file (only their keys are in memory), and refusals."""

    def __init__(self, source: str, split_seed: int, scratch: Path):
        self.keys: list[tuple[str, str]] = []
        """Hash of the prompt, which orders them, and id."""
        self.reasons: Counter[str] = Counter()
        self.short_ends = self.control_tokens = self.written_ends = 0
        self._rejected: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []
        self._seen: set[str] = set()
        self._source, self._split_seed, self._scratch = source, split_seed, scratch
        self._schema = EXAMPLES.remove(EXAMPLES.get_field_index("split"))

    def __enter__(self) -> None:
        self._writer = pa.ipc.new_file(str(self._scratch), self._schema)

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, made: _Made | _ShortEnd | Refusal) -> None:
        """Take an example, unless it was there before, or count what is none."""
        if isinstance(made, _ShortEnd):
            self.short_ends += 1
            return
        if isinstance(made, _Made) and made.example["example_id"] in self._seen:
            made = Refusal(made.source, "duplicate", made.example["prompt"], made.example["example_id"])
        if isinstance(made, Refusal):
            detail = made.detail[:200].encode(errors="backslashreplace").decode()[:200]
            self._rejected.append({**asdict(made), "detail": detail})
            self.reasons[made.reason] += 1
            return
        self.control_tokens += made.control_tokens
        self.written_ends += made.written_end
        example = made.example
        self._seen.add(example["example_id"])
        self.keys.append((digest([self._split_seed, example["prompt"]]), example["example_id"]))
        self._pending.append(example)
        if len(self._pending) == BATCH:
            self._flush()

    def check(self, max_rejected: float, run_dir: Path | None) -> None:
        """Refuse to go on when too many rows were refused, or none is left; the refused are then left in `run_dir`."""
        file = run_dir / "rejected.parquet" if run_dir is not None else None
        if file is not None:
            file.unlink(missing_ok=True)  # of an earlier attempt
        try:
            _check_rejected(max_rejected, self._source, self.reasons, len(self.keys), self._rejected, file)
            if not self.keys:
                why = "all articles are shorter than half a piece; lower data.piece_tokens"
                if self._rejected:
                    why = f"all rows were rejected; {_places(self._rejected, file)}"
                raise InputError(f"data.source {self._source}: no examples are left: {why}")
        except InputError:
            if file is not None and self._rejected:
                self._write_rejected(file)
            raise

    def prompt_hashes(self) -> list[str]:
        """Of the examples in their order."""
        return sorted(prompt for prompt, _ in self.keys)

    def write(self, folder: Path, ends: Sequence[int]) -> None:
        """Write the examples in order, with their splits, and the refusals."""
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        with pa.memory_map(str(self._scratch)) as scratch:
            unordered = pa.ipc.open_file(scratch).read_all()
            with pq.ParquetWriter(folder / "examples.parquet", EXAMPLES, compression="zstd") as writer:
                for name, start, end in _ranges(ends):
                    for chunk in _batches(order[start:end], BATCH):
                        rows = unordered.take(chunk).append_column("split", pa.array([name] * len(chunk)))
                        writer.write_table(rows.select(EXAMPLES.names).cast(EXAMPLES))
        self._scratch.unlink()
        if self._rejected:  # `datasets` reads no table of no rows
            self._write_rejected(folder / "rejected.parquet")

    def _write_rejected(self, file: Path) -> None:
        pq.write_table(pa.Table.from_pylist(self._rejected, schema=REJECTED), file)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=self._schema))
        self._pending = []


def _check_rejected(
    limit: float,
    source: str,
    reasons: Mapping[str, int],
    kept: int,
    rejected: Sequence[Mapping[str, Any]],
    file: Path | None,
) -> None:
    """Refuse when of all rows, `kept` and `rejected`, too many were rejected; `file` has these rows."""
    count = sum(reasons.values())
    if count > limit * (kept + count):
        raise InputError(
            f"data.source {source}: {count:,} of {kept + count:,} rows were rejected ({_counts(reasons)}), more than "
            f"data.max_rejected {limit:g} allows; {_places(rejected, file)}; correct them or raise the limit"
        )


def _places(rejected: Sequence[Mapping[str, Any]], file: Path | None) -> str:
    """Return where to look: the first row of each of the most frequent reasons, and the file that has all of them."""
    first = {row["reason"]: row for row in reversed(rejected)}
    frequent = [reason for reason, _ in Counter(row["reason"] for row in rejected).most_common(NAMED_REASONS)]
    rows = [f"{first[reason]['source']} ({reason}: {one_line(first[reason]['detail'], 120)})" for reason in frequent]
    return f"see {', '.join(rows)}{f'; all of them are in {file}' if file is not None else ''}"


def split_ends(
    prompt_hashes: Sequence[str], train: int | None, validation: int, test: int | None
) -> tuple[int, int, int]:
    """Where the train, validation and test splits end among examples ordered by the hash of their prompt.

    A boundary that would cut between equal prompts moves behind them.

    Raises:
        InputError: there are fewer rows than asked for training and validation, or a split that was asked for is empty.
    """
    rows = len(prompt_hashes)
    asked = {"train": train, "validation": validation, "test": test}
    wanted = " + ".join(f"data.{name} {number:,}" for name, number in asked.items() if number)
    if train is None:
        train = rows - validation - (test or 0)
    if train < 1 or rows < train + validation:
        raise InputError(f"{wanted}: only {rows:,} rows are left to split; ask for fewer, or give more rows")
    train_end = _behind_equals(prompt_hashes, train)
    validation_end = _behind_equals(prompt_hashes, min(train_end + validation, rows))
    test_end = rows if test is None else min(validation_end + test, rows)
    for name, size in (("validation", validation_end - train_end), ("test", test_end - validation_end)):
        if asked[name] and not size:
            raise InputError(
                f"{wanted}: of {rows:,} rows none is left for data.{name}; ask for fewer, or give more rows"
            )
    return train_end, validation_end, test_end


def _warn_of_short_splits(config: Data, ends: tuple[int, int, int]) -> None:
    """Rows that were rejected come off the last split, and rows of equal prompts may move a boundary."""
    asked = {"validation": config.validation, "test": config.test}
    for name, start, end in _ranges(ends):
        if (wanted := asked.get(name)) and end - start < wanted:
            log.warning("examples: data.%s is %s, but only %s are left for it", name, f"{wanted:,}", f"{end - start:,}")


def _behind_equals(ordered: Sequence[str], end: int) -> int:
    while 0 < end < len(ordered) and ordered[end - 1] == ordered[end]:
        end += 1
    return end


def _ranges(ends: Sequence[int]) -> list[tuple[str, int, int]]:
    return list(zip(SPLITS, (0, *ends), ends, strict=False))


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer byte by byte, so that its fingerprint stays; config.json names the class of some of them."""
    target.mkdir()
    for name in (*TOKENIZER_FILES, "config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _report(facts: dict[str, Any], found: str = "") -> None:
    """Say how many examples there are, and what of their texts was taken otherwise than it is written."""
    log.info("%s%s", _summary(facts), found)
    if count := facts["control_tokens"]:
        log.warning(
            "examples: %s have control tokens in their texts; they are encoded as plain text; put control tokens "
            "that are meant into data.template", f"{count:,}",
        )  # fmt: skip
    if count := facts["written_ends"]:
        log.warning("examples: %s targets end in a written EOS token; it is encoded as the end of the target",
                    f"{count:,}")  # fmt: skip


def _summary(facts: dict[str, Any]) -> str:
    splits = ", ".join(f"{number:,} {name}" for name, number in facts["examples"].items())
    rejected = facts["rejected"]
    reasons = f" ({_counts(rejected)})" if rejected else ""
    ends = facts["short_ends"]
    short = f"; {ends:,} ends of articles shorter than half a piece left out" if ends else ""
    return f"examples: {splits}; {sum(rejected.values()):,} rejected{reasons}{short}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
