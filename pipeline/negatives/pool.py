"""Negatives from other models (Xu et al. 2024): a file of continuations, or a model with a tokenizer of its own.

Their token ids mean nothing to the model that is trained: continuations come as text, and are encoded as targets are.
"""

import hashlib
import json
import logging
import reprlib
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cpo_pipe.data import templates
from cpo_pipe.data.errors import InputError, cause
from cpo_pipe.data.executor import Made, Make
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, Spec, digest, distrust, sha256_once
from cpo_pipe.data.models import Model, TokenizerFiles, tokenizer_in
from cpo_pipe.data.readers import Unreadable, duplicate, is_encodable, other_content, values
from cpo_pipe.data.recipe import PoolColumns, listed, nearest
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.pipeline.engines.base import LazyEngine, Sampled, Sampling
from cpo_pipe.pipeline.missing import SAMPLE_INDICES, refused_source
from cpo_pipe.pipeline.negatives.rows import negative

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

STRATEGY = "pool"
ENCODING = 3
"""Raise when the same texts come to be other token ids."""
FORMATS = (".jsonl", ".parquet", ".json")
_ROLES = {"prompt": "user", "text": "assistant"}
"""Whose message a column of conversations has."""
READ_AT_ONCE = 1024
"""Rows of a Parquet file that are read together."""


def pool_file_spec(rendering: Spec, sha256: str, columns: PoolColumns, max_tokens: int) -> Spec:
    """The file is its content: neither its path nor the pool's name or strength is part of it."""
    return {"strategy": STRATEGY, "file": sha256, "columns": columns.model_dump(), "prompt": rendering,
            "max_tokens": max_tokens, "encoding": ENCODING}  # fmt: skip


def pool_model_spec(
    rendering: Spec, generator: str, tokenizer: str, sampling: Sampling, seed: int, chat_date: str | None = None
) -> Spec:
    """The model's distribution over texts, of which its tokenizer is a part, and what makes token ids of them."""
    return {"strategy": STRATEGY, "generator": generator, "tokenizer": tokenizer, "prompt": rendering,
            "sampling": sampling.spec(), "seed": seed, "encoding": ENCODING,
            **({"chat_date": chat_date} if chat_date else {})}  # fmt: skip


def other_tokenizer(model: Model, tokenizer: TokenizerFiles, store: Store) -> TokenizerFiles | None:
    """The model's own tokenizer, where it has one and that is not `tokenizer`."""
    if not any((model.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    own = tokenizer_in(model.path, store)
    return None if own.fingerprint == tokenizer.fingerprint else own


def as_targets(
    texts: Sequence[str], ends: Sequence[bool], tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> Iterator[tuple[str, list[int], bool]]:
    """Of each continuation its text, its token ids as a target has them, and whether it ends there.

    Args:
        texts: the continuations.
        ends: whether each is whole, so that an EOS token follows it.
        tokenizer: of the model that is trained. The space that it puts before a text takes the place of one there.
        max_tokens: longer ones, the EOS token counted, are cut to so many and do not end.
    """
    end = templates.eos_token_id(tokenizer)
    texts = [templates.without_eos(text, tokenizer) for text in texts]
    if _doubles_space(tokenizer):
        texts = [text.removeprefix(" ") for text in texts]
    for text, whole, ids in zip(texts, ends, templates.encode_targets(texts, tokenizer), strict=True):
        if len(ids) > max_tokens:
            yield str(tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)), ids[:max_tokens], False
        elif whole and len(ids) < max_tokens:
            yield text, [*ids, end], True
        else:
            yield text, ids, False


def _refusal(example_id: str, sample_index: int, reason: str, detail: str) -> dict[str, Any]:
    """A row of the REJECTED schema."""
    return {"source": refused_source(sample_index), "example_id": example_id, "reason": reason, "detail": detail[:200]}


# ── a file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PoolFile:
    """A file of continuations: JSON lines, Parquet, or JSON that is one list of objects; or a folder of Parquet files.

    Prompt and continuation may each be a conversation of one message.
    """

    pool: str
    """The pool's name; for messages only."""
    path: Path
    columns: PoolColumns

    def sha256(self, hash_file: Callable[[Path], str]) -> str:
        """Hash of its bytes; of a folder, of its files in their order.

        Raises:
            InputError: there is no such file, or its format is not read.
        """
        if self.path.is_dir():
            return digest([hash_file(file) for file in self._folder()])
        if not self.path.is_file():
            raise self.error(f"no such file; give the path of a {', '.join(FORMATS)} file")
        if self.path.suffix.lower() not in FORMATS:
            raise self.error(f"the suffix {self.path.suffix!r} is none of {', '.join(FORMATS)}; convert it")
        return hash_file(self.path)

    def check_unchanged(self, sha256: str) -> None:
        """Verify the file before reading texts: it must match `sha256`.

        Raises:
            InputError: it is not.
        """
        if self.sha256(sha256_once) != sha256:
            for file in self._folder() if self.path.is_dir() else [self.path]:
                distrust(file)
            raise self.error("has changed since it was hashed; restore it, or run the command again to use it as it is")

    def _folder(self) -> list[Path]:
        """The Parquet files of a folder and its subfolders, such as of a data set of the hub."""
        files = sorted(self.path.rglob("*.parquet"))
        if not files:
            saved = (self.path / "state.json").is_file() or (self.path / "dataset_dict.json").is_file()
            fix = "; save_to_disk wrote it: write it again with to_parquet" if saved else ""
            raise self.error(f"there are no *.parquet files in this folder{fix}")
        return files

    def error(self, fault: str) -> InputError:
        """What is wrong with it, in one line."""
        return InputError(f"negatives.pools.{self.pool}.file {self.path}: {fault}")

    def check(self) -> None:
        """Look at the first row: what is wrong with all is known before other negatives are made.

        Raises:
            InputError: it has no rows, it cannot be read, or the first row breaks a rule.
        """
        next(self.continuations(self.key()), None)

    def key(self) -> str:
        """The column of the EXAMPLES schema that says whose its continuations are: `example_id` where it has one.

        Raises:
            InputError: it has no rows, or cannot be read.
        """
        for _, row in self._rows():
            return "example_id" if "example_id" in row else "prompt"
        raise self.error("there are no rows in it")

    def continuations(self, key: str) -> Iterator[tuple[str, str]]:
        """Whose (by that column of the EXAMPLES schema) and text of each, in the order of the file.

        Raises:
            InputError: a column is missing, a value is not text, or the file cannot be read.
        """
        for place, row in self._rows():
            (owner,) = self._texts(place, row, key)
            if key == "prompt" and self.columns.context is not None:
                context = self._value(place, row, "context")
                owner = templates.with_context(owner, "" if context is None else self._texts(place, row, "context")[0])
            for text in self._texts(place, row, "text"):
                yield owner, text

    def _texts(self, place: str, row: Mapping[str, Any], field: str) -> list[str]:
        """The text of a column; of the continuations' own also a list of them; either also as a message."""
        value = self._value(place, row, field)
        if _is_conversation(value) and field in _ROLES:
            if len(value) > 1 or value[0].get("role") != _ROLES[field]:
                roles = ", ".join(str(message.get("role")) for message in value)
                raise self.error(
                    f"{place}: {self._column(field)!r} is a conversation of {_shown(roles)}: must be one message of "
                    f"the {_ROLES[field]}; leave out what has more"
                )
            value = value[0].get("content")
        texts = value if field == "text" and isinstance(value, list) else [value]
        for text in texts:
            if isinstance(text, Unreadable):
                raise self.error(f"{place}: {self._column(field)!r} is {text.reason}")
            if not _is_text(text):
                raise self.error(f"{place}: {self._column(field)!r} is {_shown(text)}: must be text")
        return texts

    def _value(self, place: str, row: Mapping[str, Any], field: str) -> Any:
        column = self._column(field)
        if column not in row:
            hint = nearest(column, row) or f"there are {listed(row)}"
            raise self.error(f"{place}: no column {column!r} (negatives.pools.{self.pool}.columns.{field}); {hint}")
        return row[column]

    def _column(self, field: str) -> str:
        return str(getattr(self.columns, field, field))  # `example_id` is called so everywhere

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Where each row stands, and its values."""
        kinds = {".jsonl": self._jsonl, ".parquet": self._parquet, ".json": self._json}
        if not self.path.is_dir() and self.path.suffix.lower() == ".jsonl" and (content := other_content(self.path)):
            raise self.error(f"contains {content}; save it as text in UTF-8")
        read = self._parquets if self.path.is_dir() else kinds[self.path.suffix.lower()]
        try:
            for place, row in read():
                if not isinstance(row, dict):
                    raise self.error(f"{place} is {_shown(row)}: must be an object")
                yield place, row
        except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
            raise self.error(f"cannot be read ({cause(error)})") from error

    def _jsonl(self) -> Iterator[tuple[str, Any]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise self.error(f"line {number} is not JSON ({cause(error)})") from error
                    yield f"line {number}", row

    def _parquets(self) -> Iterator[tuple[str, Any]]:
        for file in self._folder():
            yield from ((f"{file.relative_to(self.path)}, {place}", row) for place, row in self._parquet(file))

    def _parquet(self, path: Path | None = None) -> Iterator[tuple[str, Any]]:
        with pq.ParquetFile(path or self.path) as file:
            wanted = ("example_id", self.columns.prompt, self.columns.context, self.columns.text)
            there = [name for name in file.schema_arrow.names if name in wanted]
            if twice := duplicate(there):
                raise self.error(f"has two columns named {twice!r}; rename or remove one")
            # Of a file that lacks one all are read: the message then says which there are.
            batches = file.iter_batches(READ_AT_ONCE, columns=there if len(there) > 1 else None)
            rows = chain.from_iterable(map(_batch_rows, batches))
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))

    def _json(self) -> Iterator[tuple[str, Any]]:
        content = json.loads(self.path.read_bytes())
        if not isinstance(content, list):
            raise self.error("must be a list of objects; of one object a line make a .jsonl file")
        yield from ((f"row {number}", row) for number, row in enumerate(content, 1))


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    for row in zip(*map(values, batch.columns), strict=True):
        yield dict(zip(names, row, strict=True))


class _Continuations:
    """The first continuations that a file has for each of some keys.

    The texts are in a scratch file: a million prompts with eleven continuations each are gigabytes. In memory are the
    keys' hashes and where each text stands.
    """

    def __init__(
        self, keys: Iterable[str], limit: int, found: Iterable[tuple[str, str]], is_control: Callable[[str], bool]
    ):
        """Of the texts `found`, each after its key, the first `limit` of each of the `keys` are kept."""
        self._number = {key: number for number, key in enumerate(dict.fromkeys(map(_short, keys)))}
        self._scratch = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this lives
        weakref.finalize(self, self._scratch.close)
        self._end = array("q", [0])
        owners, counts = array("i"), array("i", bytes(4 * len(self._number)))
        self.control_tokens = 0
        """How many of those kept have control tokens in their text."""
        for key, text in found:
            number = self._number.get(_short(key))
            if number is not None and counts[number] < limit:
                counts[number] += 1
                owners.append(number)
                self.control_tokens += is_control(text)
                self._end.append(self._end[-1] + self._scratch.write(text.encode()))
        self.counts = np.array(counts, np.int64)
        """How many were kept, by key."""
        self._order = np.argsort(owners, kind="stable")
        self._first = np.cumsum(self.counts) - self.counts

    def text(self, key: str, k: int) -> str | None:
        """The k-th of a key, from 0; None where there is none."""
        number = self._number[_short(key)]
        if k >= self.counts[number]:
            return None
        place = self._order[self._first[number] + k]
        start, end = self._end[place], self._end[place + 1]
        self._scratch.seek(start)
        return self._scratch.read(end - start).decode()


@dataclass(frozen=True)
class FromFile:
    """Work that takes sample k of an example from a file: the k-th continuation that it has for the example."""

    rows: Rows
    refused: Rows
    """Samples that the file does not have (REJECTED schema)."""
    file: PoolFile
    sha256: str
    """Of the file."""
    selection: pa.Table
    """`example_id` and `prompt` of all examples."""
    count: int
    """Samples that each example is to get."""
    tokenizer: TokenizerFiles
    max_tokens: int
    at_once: bool = False

    @property
    def outputs(self) -> list[Rows]:
        """Reasons of the refused, and the negatives."""
        return [self.refused, self.rows]

    def open(self) -> Make:
        """Read the file and load the tokenizer.

        Raises:
            InputError: the file breaks a rule, or has nothing for any of the examples.
        """
        self.file.check_unchanged(self.sha256)
        key = self.file.key()
        log.info("negatives.pools.%s.file %s: reading it", self.file.pool, self.file.path)
        keys = (value.as_py() for value in self.selection[key])
        tokenizer = self.tokenizer.load()
        is_control = templates.finder(templates.special_tokens(tokenizer))
        found = _Continuations(keys, self.count, self.file.continuations(key), is_control)
        self._report(key, found.counts)
        if found.control_tokens:
            log.warning(
                "negatives.pools.%s.file %s: %d continuations have special tokens in their text; they are text to the "
                "model, but for an EOS token at the end", self.file.pool, self.file.path, found.control_tokens,
            )  # fmt: skip

        def make(batch: pa.Table) -> Iterator[Made]:
            refused, taken, texts = [], [], []
            for example in batch.select(["example_id", "prompt", SAMPLE_INDICES]).to_pylist():
                for k in example[SAMPLE_INDICES]:
                    text = found.text(example[key], k)
                    if text is None:
                        refused.append(_refusal(example["example_id"], k, "not in the file", example["prompt"]))
                    else:
                        taken.append((example, k))
                        texts.append(text)
            rows = [
                negative(example, k, 0, strategy=STRATEGY, text=text, token_ids=ids, ends=ends, generator=self.sha256)
                for (example, k), (text, ids, ends) in zip(
                    taken, as_targets(texts, [True] * len(texts), tokenizer, self.max_tokens), strict=True
                )
            ]
            yield Made([refused, rows], len(refused) + len(rows))

        return make

    def _report(self, key: str, counts: NDArray[np.int64]) -> None:
        """Say how much of the selection the file has."""
        there, whole, what = int((counts > 0).sum()), int((counts == self.count).sum()), key.replace("_", " ") + "s"
        if not there:
            theirs, _ = next(self.file.continuations(key))
            hint = f"; without its column {key} it is matched by prompt" if key == "example_id" else ""
            raise self.file.error(
                f"has none of the examples' {len(counts):,} {what}; there is {_shown(theirs)}, "
                f"the first example has {_shown(self.selection[key][0].as_py())}{hint}"
            )
        if whole < len(counts):
            log.warning(
                "negatives.pools.%s.file %s: has %d of %d %s, %d of them with %d continuations; others get fewer",
                *(self.file.pool, self.file.path, there, len(counts), what, whole, self.count),
            )


# ── a model ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FromModel:
    """Work that samples with a model whose tokenizer is its own, and encodes its texts as targets are."""

    rows: Rows
    refused: Rows
    """Samples that cannot be made, such as those of prompts that leave the model no room (REJECTED schema)."""
    engine: LazyEngine
    own_tokenizer: TokenizerFiles
    template: str
    """With `chat` a prompt is rendered by the model's own chat template, otherwise as for the model that is trained."""
    sampling: Sampling
    """In the model's own tokens; `max_new_tokens` is also the limit after encoding anew."""
    seed: int
    tokenizer: TokenizerFiles
    """Of the model that is trained."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What is the same in all rows."""
    chat_date: str | None = None
    """That the model's own chat template prints."""
    at_once: bool = False

    @property
    def outputs(self) -> list[Rows]:
        """Reasons of the refused, and the negatives."""
        return [self.refused, self.rows]

    def open(self) -> Make:
        """Load the engine and both tokenizers.

        Raises:
            InputError: the model's tokenizer lacks the chat template that it needs.
        """
        own, tokenizer = self.own_tokenizer.load(), self.tokenizer.load()
        chat = self.template == templates.CHAT
        if chat and not own.chat_template:
            raise InputError(
                f"model {self.engine.model.name}: data.template is chat, but its tokenizer has no chat template; "
                "take the chat version of the model, or another template"
            )
        sample = Sampled(self.rows, self.engine, self.sampling, self.seed, self.own_tokenizer, self.columns).open()
        context, new = self.engine.model.context(), self.sampling.max_new_tokens

        def make(batch: pa.Table) -> Iterator[Made]:
            prompts = self._prompts(batch, own)
            fits = [bool(ids) and (context is None or len(ids) + new <= context) for ids in prompts]
            wanted = zip(batch["example_id"].to_pylist(), batch[SAMPLE_INDICES].to_pylist(), prompts, fits, strict=True)
            refused = [
                _refusal(
                    example_id, k, "prompt too long" if ids else "empty prompt", f"{len(ids)} tokens, of {context}"
                )
                for example_id, indices, ids, fit in wanted
                if not fit
                for k in indices
            ]
            yield Made([refused, []], len(refused))
            place = batch.schema.get_field_index("prompt_ids")
            batch = batch.set_column(place, "prompt_ids", pa.array(prompts, batch.schema.field(place).type))
            behind = dict(zip(batch["example_id"].to_pylist(), prompts, strict=True))
            for made in sample(batch.filter(pa.array(fits))) if any(fits) else ():
                yield Made(encode(made.rows[0], behind), made.units)

        def encode(
            samples: Sequence[Mapping[str, Any]], prompts: Mapping[str, list[int]]
        ) -> list[list[dict[str, Any]]]:
            """Refused rows and negatives."""
            ends = [sample["finish_reason"] == "stop" for sample in samples]
            texts = []
            for sample, whole in zip(samples, ends, strict=True):
                # An answer in a chat begins a text; what follows a prompt goes on with it, with a space perhaps.
                before = [] if chat else prompts[sample["example_id"]]
                text = text_behind(before, sample["token_ids"][:-1] if whole else sample["token_ids"], own)
                texts.append(text if whole else text.rstrip("\ufffd"))  # of a character that was cut through
            refused, rows = [], []
            for sample, (text, ids, whole) in zip(samples, as_targets(texts, ends, tokenizer, new), strict=True):
                if ids:
                    reason = "stop" if whole else "length"
                    rows.append({**sample, "text": text, "token_ids": ids, "finish_reason": reason, "logprob": None})
                else:
                    refused.append(_refusal(sample["example_id"], sample["sample_index"], "empty", text))
            return [refused, rows]

        return make

    def _prompts(self, batch: pa.Table, own: "PreTrainedTokenizerBase") -> list[list[int]]:
        """The examples' prompts in the model's own tokens."""
        prompts, rendered = (batch[name].to_pylist() for name in ("prompt", "rendered"))
        return templates.encode_prompts_again(self.template, prompts, rendered, own, self.chat_date)


def text_behind(prompt_ids: Sequence[int], token_ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that tokens add to a prompt.

    Decoded together: SentencePiece-like tokenizers take the space off the start of what they decode.
    """
    before, both = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (list(prompt_ids), [*prompt_ids, *token_ids])
    )
    return both[len(before) :]


def _doubles_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether encoding puts a space before a text, and another one before a text that begins with one (Llama).

    What continues a prompt with a space begins with the tokenizer's own one then.
    """
    text, spaced = templates.encode_texts(["a", " a"], tokenizer)
    return text != spaced and text_behind(text, text, tokenizer) == " a"


def _is_conversation(value: object) -> bool:
    """Whether it is messages, as chat templates take them."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _is_text(value: object) -> bool:
    """Whether it is a string that can be encoded: JSON can name halves of characters."""
    return isinstance(value, str) and is_encodable(value)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)  # which looks at no more than it shows
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(key: str) -> bytes:
    """A hash that takes the place of a prompt."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
