"""Systems whose outputs exist already, in a file in AlpacaEval's format or with columns of other names."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pydantic import Field

from cpo_pipe.data.config import Section
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec, digest
from cpo_pipe.data.models.answers import AnswerEncoder
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.sources.locate import locate_source
from cpo_pipe.data.sources.rows import Refusal, text_fault
from cpo_pipe.data.sources.source import Source
from cpo_pipe.data.store import Rows, Store
from cpo_pipe.data.text import abridged, listed
from cpo_pipe.pipeline.negatives.pool import ENCODED_FOR

PROMPTS = ("prompt", "instruction", "question")
OUTPUTS = ("output", "text", "completion", "response", "answer")
"""Names of columns that are known, the first that a file has is read. `instruction` and `output` are AlpacaEval's."""
UNLIMITED = 1 << 30
"""Tokens: an output is measured whole, whatever its length."""


class OutputColumns(Section):
    """Which column of a file of outputs holds what."""

    prompt: str | None = Field(
        None,
        description=f"column with the prompt, as in data.source (default: the first of {', '.join(PROMPTS)}); a file "
        "with a column example_id is matched by that column",
    )
    output: str | None = Field(None, description=f"column with the output (default: the first of {', '.join(OUTPUTS)})")


@dataclass(frozen=True)
class OutputFile:
    """A file with one output for each prompt; made by `open_outputs`."""

    source: Source
    key: str
    """The column of the EXAMPLES schema that rows are matched by: `example_id` or `prompt`."""
    key_column: str
    """The file's column for it."""
    output_column: str
    identity: Spec
    """What decides its rows."""

    @property
    def name(self) -> str:
        """The file, as the recipe names it."""
        return self.source.name

    @property
    def fingerprint(self) -> str:
        """Hash of the content that is read."""
        return digest([self.identity, self.key_column, self.output_column])

    def outputs(self, selection: pa.Table) -> list[str]:
        """Return the output for each example, in their order.

        Of several outputs for one prompt the first is taken.

        Args:
            selection: `example_id` and `prompt` of the examples.

        Raises:
            InputError: a row cannot be read, or an example has no output.
        """
        found: dict[str, str] = {}
        for row in self.source.read({"prompt": self.key_column, "output": self.output_column}):
            if isinstance(row, Refusal):
                raise self.source.request({}).error(f"{row.source}: {row.reason} ({row.detail}); correct the row")
            for column in (self.key_column, self.output_column):
                if fault := text_fault(row.values.get(column), f"column {column}"):
                    reason, detail = fault
                    raise self.source.request({}).error(f"{row.source}: {reason} ({detail}); correct the row")
            key = unicodedata.normalize("NFC", row.values[self.key_column])
            found.setdefault(key, row.values[self.output_column])
        keys = [unicodedata.normalize("NFC", key) for key in selection[self.key].to_pylist()]
        absent = [key for key in keys if key not in found]
        if absent:
            wanted, there = (abridged(repr(one)) for one in (absent[0], next(iter(found))))
            raise self.source.request({}).error(
                f"has no output for {len(absent):,} of {len(keys):,} examples, the first of them {wanted}; it has one "
                f"for {there}; add the outputs, correct the {self.key} in column {self.key_column}, or evaluate fewer "
                "examples"
            )
        return [found[key] for key in keys]


def open_outputs(system: str, file: str, columns: OutputColumns, store: Store) -> OutputFile:
    """Return a system's file of outputs.

    Raises:
        InputError: no such file, its format is not supported, it has no rows, or it lacks a column.
    """
    key = f"evaluate.systems.{system}"
    source = locate_source(file, key=f"{key}.file", columns_key=f"{key}.columns")
    first = next((row for row in source.read({}, None, 1) if not isinstance(row, Refusal)), None)
    names = list(first.values) if first is not None else []

    def column(field: str, given: str | None, known: Sequence[str]) -> str:
        found = [name for name in ([given] if given is not None else known) if name in names]
        if not found:
            asked = given if given is not None else f"any of {', '.join(known)}"
            raise source.request({}).error(f"has no column {asked}; it has {listed(names)}; set {key}.columns.{field}")
        return found[0]

    by_id = columns.prompt is None and "example_id" in names
    matched = "example_id" if by_id else column("prompt", columns.prompt, PROMPTS)
    output = column("output", columns.output, OUTPUTS)
    identity = source.identity(store.hash_file)
    return OutputFile(source, "example_id" if by_id else "prompt", matched, output, identity)


@dataclass(frozen=True)
class OutputFileWork(Work):
    """Work that reads a system's outputs from its file."""

    rows: Rows
    file: OutputFile
    selection: pa.Table
    """`example_id` and `prompt` of all examples."""
    tokenizer: TokenizerFiles
    rendering: Spec
    """Of the examples."""

    def open(self) -> Make:
        """Read the file and load the tokenizer."""
        self.file.source.check(self.file.identity)
        texts = dict(zip(self.selection["example_id"].to_pylist(), self.file.outputs(self.selection), strict=True))
        encoder = AnswerEncoder(self.tokenizer.load(), self.rendering, continuations=True)

        def make(batch: pa.Table) -> Iterator[NewRows]:
            examples = batch.select(ENCODED_FOR).to_pylist()
            written = [texts[example["example_id"]] for example in examples]
            answers = encoder.encode(examples, written, UNLIMITED, [True] * len(written))
            rows = [
                {
                    "example_id": example["example_id"], "sample_index": 0, "text": text, "token_ids": answer.token_ids,
                    "finish_reason": "stop" if answer.ends else "length", "seed": 0, "engine": "file",
                }
                for example, text, answer in zip(examples, written, answers, strict=True)
            ]  # fmt: skip
            yield NewRows([rows], len(rows))

        return make
