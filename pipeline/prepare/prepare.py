"""Stage `prepare`: read ground truth, render and tokenize it, reject what breaks a rule, and split it."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import TOKENIZER_FILES, Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.chat_date import chat_date
from cpo_pipe.data.models.tokenizer import TokenizerFiles, locate_tokenizer
from cpo_pipe.data.models.train_tokenizer import TrainedBPE
from cpo_pipe.data.progress import track
from cpo_pipe.data.sources.source import Source
from cpo_pipe.data.store import ArtifactWriter, Store
from cpo_pipe.pipeline.prepare.base import Data, Texts
from cpo_pipe.pipeline.prepare.collect import ExampleCollector
from cpo_pipe.pipeline.prepare.rejected import check_rejected, listed_counts
from cpo_pipe.pipeline.prepare.rows import count_rows, read_rows
from cpo_pipe.pipeline.prepare.split import SPLITS, split_ends, split_ranges, warn_of_short_splits

log = logging.getLogger(__name__)

RULES = 4
"""Raise it when the same rows yield other examples; this invalidates examples prepared before."""


def prepare(config: Data, store: Store, run_dir: Path | None = None) -> Examples:
    """Make the examples that a recipe's `data` section describes, or find them in the store.

    Args:
        config: the section.
        store: where the examples are kept.
        run_dir: where `rejected.parquet` is written when no examples are made; None: nowhere.

    Raises:
        InputError: a setting or the source breaks a rule, or more than `max_rejected` of the rows do.
    """
    source = config.open_source()
    config = config.resolved(source)
    content = _content(config, source, store)
    if (examples := _found(config, source, content, store)) is not None:
        _report(examples.artifact.manifest, f" (found in {examples.artifact.name})")
        return examples
    source.check(content["source"])  # refuse a damaged source before it is read
    if isinstance(config.tokenizer, str):
        tokenizer = locate_tokenizer(config.tokenizer, store)
    else:
        rows = (row for row in read_rows(config, source) if isinstance(row, Texts))
        texts = (text for row in rows for text in config.corpus(row))
        tokenizer = _bpe(config, content, store).trained(texts)
    examples = _examples(config, content, tokenizer, store)
    if not examples.artifact.make(lambda writer: _write(examples, writer, config, source, run_dir)):
        _check_found(examples, config, source)  # another process made them meanwhile
    _report(examples.artifact.manifest)
    return examples


def find_examples(config: Data, store: Store) -> Examples | None:
    """Return the examples that a recipe's `data` section describes, or None where the store has none.

    Raises:
        InputError: for the reasons that `prepare` raises it.
    """
    source = config.open_source()
    config = config.resolved(source)
    return _found(config, source, _content(config, source, store), store)


def _write(examples: Examples, writer: ArtifactWriter, config: Data, source: Source, run_dir: Path | None) -> None:
    """Read, encode, split and write the examples."""
    tokenizer = examples.tokenizer.load()
    templates.eos_token_id(tokenizer)  # an error now, not after the work
    train, validation, test = config.split_sizes()
    collector = ExampleCollector(source.name, config.split_seed, writer.path / "unordered.arrow")
    with track("prepare", count_rows(config, source)) as meter, collector:
        for encoded in config.encode(read_rows(config, source, meter.advance), tokenizer, examples.rendering):
            collector.add(encoded)
    log.info("examples: read %s rows as %s", f"{meter.done:,}", config.format_label)
    collector.check(config.max_rejected, run_dir)
    ends = split_ends(collector.prompt_hashes(), train, validation, test)
    collector.write(writer.path, ends)
    warn_of_short_splits(validation, test, ends)
    (writer.path / "tokenizer").mkdir()
    for name in (*TOKENIZER_FILES, "config.json"):  # byte by byte: the fingerprint stays
        if (examples.tokenizer.path / name).is_file():
            shutil.copyfile(examples.tokenizer.path / name, writer.path / "tokenizer" / name)
    writer.facts["rows_read"] = meter.done
    writer.facts["examples"] = {name: end - start for name, start, end in split_ranges(ends)}
    writer.facts["end_tokens"] = [token for token, _ in collector.end_tokens.most_common()]
    writer.facts["most_rejected"] = collector.most_rejected
    writer.facts["left_over"] = len(collector.keys) - ends[-1]
    writer.facts["rejected"] = dict(collector.reasons.most_common())
    writer.facts["short_ends"] = collector.short_ends
    writer.facts["control_tokens"] = collector.control_tokens
    writer.facts["written_ends"] = collector.written_ends


def _found(config: Data, source: Source, content: Spec, store: Store) -> Examples | None:
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
    _check_found(examples, config, source)
    return examples


def _content(config: Data, source: Source, store: Store) -> Spec:
    """Return what decides the texts."""
    return {
        "source": source.identity(store.hash_file),
        "reading": config.reading(),
        "max_rows": config.max_rows,
    }


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
    split = {"seed": config.split_seed, **dict(zip(SPLITS, config.split_sizes(), strict=True))}
    spec = {**content, "rules": RULES, "rendering": rendering, "limits": config.limits(), "split": split}
    return Examples(store.artifact("examples", spec), tokenizer, rendering)


def _check_found(examples: Examples, config: Data, source: Source) -> None:
    """Refuse examples that were made with a higher `max_rejected` than this section allows."""
    facts = examples.artifact.manifest
    if facts["rejected"]:
        file = examples.artifact.path / "rejected.parquet"
        rejected = pq.read_table(file, columns=["source", "reason", "detail"]).to_pylist()
        kept = sum(facts["examples"].values()) + facts["left_over"]
        check_rejected(config.max_rejected, source.name, facts["rejected"], kept, rejected, file)


def _report(facts: dict[str, Any], found: str = "") -> None:
    """Log how many examples there are, and which texts are not encoded as written."""
    splits = ", ".join(f"{number:,} {name}" for name, number in facts["examples"].items())
    rejected = facts["rejected"]
    line = f"examples: {splits}; {sum(rejected.values()):,} rejected"
    if rejected:
        line += f" ({listed_counts(rejected)})"
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
