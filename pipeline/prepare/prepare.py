"""Stage `prepare`: read ground truth, render and tokenize it, reject what breaks a rule, and split it."""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpo_pipe.data.errors import Findings
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.tokenizer import TokenizerFiles, locate_tokenizer
from cpo_pipe.data.models.train_tokenizer import TrainedBPE
from cpo_pipe.data.progress import track
from cpo_pipe.data.sources.rows import Refusal, Row
from cpo_pipe.data.store import ArtifactWriter, Store
from cpo_pipe.data.text import listed
from cpo_pipe.pipeline.prepare.base import Data, Texts
from cpo_pipe.pipeline.prepare.collect import ExampleCollector
from cpo_pipe.pipeline.prepare.divide import divide, near_duplicate_note
from cpo_pipe.pipeline.prepare.leakage import leakage_warnings
from cpo_pipe.pipeline.prepare.parts import Part, drawn_rows, open_parts
from cpo_pipe.pipeline.prepare.rejected import check_rejected, listed_counts
from cpo_pipe.pipeline.prepare.rows import read_rows
from cpo_pipe.pipeline.prepare.split import SPLITS

log = logging.getLogger(__name__)

RULES = 7
"""Raise it when the same rows yield other examples; this invalidates examples prepared before."""

FIRST_ROWS = 20
"""Rows of each source that are encoded before anything is made."""


def prepare(config: Data, store: Store, run_dir: Path | None = None) -> Examples:
    """Make the examples that a recipe's `data` section describes, or find them in the store.

    Args:
        config: the section.
        store: where the examples are kept.
        run_dir: where `rejected.parquet` is written when no examples are made; None: nowhere.

    Raises:
        InputError: a setting or the source breaks a rule, or more than `max_rejected` of the rows do.
    """
    parts = open_parts(config)
    config = parts[-1].config
    content = _content(config, parts, store)
    if (examples := _found(config, parts, content, store)) is not None:
        _report(examples.artifact.manifest, f" (found in {examples.artifact.name})")
        return examples
    for part, spec in zip(parts, content["sources"], strict=True):
        part.source.check(spec["source"])  # refuse a damaged source before it is read
    if isinstance(config.tokenizer, str):
        tokenizer = locate_tokenizer(config.tokenizer, store)
    else:
        texts = _corpus(config, parts)
        tokenizer = _bpe(config, content, store).trained(texts)
    examples = _examples(config, content, tokenizer, store)
    if not examples.artifact.make(lambda writer: _write(examples, writer, config, parts, run_dir)):
        _check_found(examples, config, parts)  # another process made them meanwhile
    _report(examples.artifact.manifest)
    return examples


def find_examples(config: Data, store: Store) -> Examples | None:
    """Return the examples that a recipe's `data` section describes, or None where the store has none.

    Raises:
        InputError: for the reasons that `prepare` raises it.
    """
    parts = open_parts(config)
    config = parts[-1].config
    return _found(config, parts, _content(config, parts, store), store)


def check_data(config: Data, store: Store) -> None:
    """Open all sources and encode the first rows of each, so that a wrong column or template is found in seconds.

    Raises:
        InputError: for the reasons that `prepare` raises it, except too many bad rows.
    """
    parts = open_parts(config)
    config = parts[-1].config
    findings, firsts = Findings(), []
    for part in parts:
        with findings.collect():
            firsts.append(_first_rows(part))
    findings.report()
    if isinstance(config.tokenizer, str):
        examples = _examples(config, _content(config, parts, store), locate_tokenizer(config.tokenizer, store), store)
        tokenizer = examples.tokenizer.load()
        templates.eos_token_id(tokenizer)
        for part, first in zip(parts, firsts, strict=True):
            list(part.config.encode(iter(first), tokenizer, examples.rendering))


def _first_rows(part: Part) -> list[Texts | Refusal]:
    """Return the first rows of a source; an error if all of them are rejected."""
    first = [*islice(read_rows(part.config, part.source), FIRST_ROWS)]
    refusals = [row for row in first if isinstance(row, Refusal)]
    if refusals and len(refusals) == len(first):
        example = f"{refusals[0].source}: {refusals[0].reason}, {refusals[0].detail}"
        raw = next(part.source.read({}, None, limit=1), None)
        there = f"; its columns are {listed(raw.values)}" if isinstance(raw, Row) and raw.values else ""
        raise part.source.request({}).error(f"all of its first {len(first)} rows are rejected ({example}){there}")
    return first


def _write(examples: Examples, writer: ArtifactWriter, config: Data, parts: list[Part], run_dir: Path | None) -> None:
    """Read, encode, split and write the examples."""
    tokenizer = examples.tokenizer.load()
    templates.eos_token_id(tokenizer)  # an error now, not after the work
    collector = ExampleCollector(_named(parts), config.split_seed, writer.path / "unordered.arrow")
    masks = drawn_rows(parts, config.split_seed)
    total = sum(part.total() if mask is None else int(mask.sum()) for part, mask in zip(parts, masks, strict=True))
    with track("prepare", total) as meter, collector:
        for part, mask in zip(parts, masks, strict=True):
            before = meter.done
            rows = read_rows(part.config, part.source, mask, meter.advance)
            for encoded in part.config.encode(rows, tokenizer, examples.rendering):
                collector.add(encoded, part)
            of = f" of {part.where}" if len(parts) > 1 else ""
            format_name = part.config.reading().get("format") or part.config.preset
            log.info("examples: read %s rows%s as %s", f"{meter.done - before:,}", of, format_name)
    collector.check(config.max_rejected, run_dir)
    splits = divide(collector, config, {part.split for part in parts if part.split}, writer.facts)
    collector.write(writer.path, splits)
    (writer.path / "tokenizer").mkdir()
    for name in (*TOKENIZER_FILES, "config.json"):  # byte by byte: the fingerprint stays
        if (examples.tokenizer.path / name).is_file():
            shutil.copyfile(examples.tokenizer.path / name, writer.path / "tokenizer" / name)
    writer.facts["rows_read"] = meter.done
    writer.facts["examples"] = {name: len(rows) for name, rows in splits.items()}
    writer.facts["end_tokens"] = [token for token, _ in collector.end_tokens.most_common()]
    writer.facts["most_rejected"] = collector.most_rejected
    writer.facts["merged"] = collector.merged
    writer.facts["left_over"] = len(collector.keys) - len(collector.removed) - sum(map(len, splits.values()))
    writer.facts["rejected"] = dict(collector.reasons.most_common())
    writer.facts["removed"] = dict(Counter(collector.removed.values()).most_common())
    writer.facts["short_ends"] = collector.short_ends
    writer.facts["control_tokens"] = collector.control_tokens
    writer.facts["written_ends"] = collector.written_ends


def _named(parts: list[Part]) -> str:
    """Return the sources as messages name them."""
    if len(parts) == 1:
        return f"{parts[0].source.key} {parts[0].source.name}"
    return f"data ({', '.join(part.where for part in parts)})"


def _corpus(config: Data, parts: list[Part]) -> Iterator[str]:
    """Yield the texts that a tokenizer is trained on."""
    for part, mask in zip(parts, drawn_rows(parts, config.split_seed), strict=True):
        for row in read_rows(part.config, part.source, mask):
            if isinstance(row, Texts):
                yield from part.config.corpus(row)


def _found(config: Data, parts: list[Part], content: Spec, store: Store) -> Examples | None:
    """Return the examples where they and their tokenizer are in the store; make nothing."""
    if isinstance(config.tokenizer, str):
        tokenizer: TokenizerFiles | None = locate_tokenizer(config.tokenizer, store)
    else:
        tokenizer = _bpe(config, content, store).found()
    if tokenizer is None:
        return None
    examples = _examples(config, content, tokenizer, store)
    if not examples.artifact.complete():
        return None
    _check_found(examples, config, parts)
    return examples


def _content(config: Data, parts: list[Part], store: Store) -> Spec:
    """Return what decides the texts."""
    seed = {"draw_seed": config.split_seed} if any(part.count or part.weight for part in parts) else {}
    return {"sources": [part.spec(store) for part in parts], **seed}


def _bpe(config: Data, content: Spec, store: Store) -> TrainedBPE:
    """Return the tokenizer that is trained on the texts, made or not."""
    assert not isinstance(config.tokenizer, str)
    corpus = {**content, "template": config.rendering()["template"]}
    return TrainedBPE(corpus, config.tokenizer.vocab_size, store)


def _examples(config: Data, content: Spec, tokenizer: TokenizerFiles, store: Store) -> Examples:
    """Return the examples, made or not."""
    rendering: Spec = {**config.rendering(), "tokenizer": tokenizer.fingerprint, "special_tokens": "as text"}
    if rendering["template"] == templates.CHAT and (day := chat_date(tokenizer, store)):
        rendering["chat_date"] = day
    split = {
        "seed": config.split_seed, **dict(zip(SPLITS, config.split_sizes(), strict=True)),
        "near_duplicates": config.near_duplicates, "similarity": config.near_duplicate_similarity,
        "drop_leaks": config.drop_leaks,
    }  # fmt: skip
    spec = {**content, "rules": RULES, "rendering": rendering, "limits": config.limits(), "split": split}
    return Examples(store.artifact("examples", spec), tokenizer, rendering)


def _check_found(examples: Examples, config: Data, parts: list[Part]) -> None:
    """Refuse examples that were made with a higher `max_rejected` than this section allows."""
    facts = examples.artifact.manifest
    if facts["rejected"]:
        file = examples.artifact.path / "rejected.parquet"
        rejected = pq.read_table(
            file, columns=["source", "reason", "detail"], filters=pc.field("reason").isin([*facts["rejected"]])
        ).to_pylist()
        kept = sum(facts["examples"].values()) + facts["left_over"]
        check_rejected(config.max_rejected, _named(parts), facts["rejected"], kept, rejected, file)


def _report(facts: dict[str, Any], found: str = "") -> None:
    """Log how many examples there are, and which texts are not encoded as written."""
    splits = ", ".join(f"{number:,} {name}" for name, number in facts["examples"].items())
    rejected = facts["rejected"]
    line = f"examples: {splits}; {sum(rejected.values()):,} rejected"
    if rejected:
        line += f" ({listed_counts(rejected)})"
    if removed := facts["removed"]:
        line += f"; {sum(removed.values()):,} removed ({listed_counts(removed)})"
    if count := facts["merged"]:
        line += f"; {count:,} rows with further rejected answers added to others"
    if count := facts["short_ends"]:
        line += f"; {count:,} ends of articles shorter than half a chunk dropped"
    log.info("%s%s", line, found)
    if count := facts["control_tokens"]:
        log.warning(
            "examples: %s have control tokens in their texts; they are encoded as plain text; put control tokens "
            "that are meant into data.template", f"{count:,}",
        )  # fmt: skip
    if count := facts["written_ends"]:
        log.warning("examples: %s targets end in a written EOS token; it is encoded as the end of the target",
                    f"{count:,}")  # fmt: skip
    if note := near_duplicate_note(facts):
        log.warning("examples: %s", note)
    for sentence in leakage_warnings(facts["leakage"]):
        log.warning("examples: %s", sentence)
