"""Command `export`: groups as preference data for TRL's DPOTrainer and others: prompt, chosen, rejected."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.output_folder import new_folder
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.export.card import data_card
from cpo_pipe.pipeline.export.pairs import Pair, PairCounts, pair_rows
from cpo_pipe.pipeline.export.writer import PairWriter, pair_schema
from cpo_pipe.pipeline.negatives.config import Negatives

log = logging.getLogger(__name__)

SLICE = 512
"""Groups that are read together."""


def export(
    out: Path,
    name: str,
    recipe: str,
    negatives: Negatives,
    tokenizer: TokenizerFiles,
    examples: pa.Table,
    groups: Rows,
    pairs: Sequence[Pair],
    conversational: bool,
) -> None:
    """Write groups to a folder as preference data, with a data card.

    Args:
        out: a folder that is new or empty.
        name: title of the data set, in its card.
        recipe: the recipe of the groups as YAML; it goes into the card.
        negatives: what the groups are made of.
        tokenizer: of the examples.
        examples: the examples whose groups are written (EXAMPLES schema).
        groups: the groups.
        pairs: labels of the pairs; empty: the target with each of the negatives.
        conversational: texts as messages, and the prompt before the template.

    Raises:
        InputError: `out` is not empty, or no pair can be written.
    """
    encoder, counts = tokenizer.load(), PairCounts()
    if conversational and not encoder.chat_template:
        log.warning("export: the tokenizer of the examples has no chat template; TRL needs one to render messages")
    with new_folder(out) as scratch:
        writer = PairWriter(scratch / "data", pair_schema(conversational))
        with track("export", examples.num_rows) as meter:
            start = 0
            for part in groups.batches(examples["example_id"], SLICE):
                own = examples.slice(start, part.num_rows).select(["prompt", "rendered"]).to_pylist()
                start += part.num_rows
                writer.write([*pair_rows(part.to_pylist(), own, pairs, conversational, encoder, counts)])
                meter.advance(part.num_rows)
        writer.close()
        if not writer.rows:
            raise InputError(
                f"--out {out}: no pair to write: {counts.endless:,} have a text that does not end (cut at a token "
                f"limit), which this format cannot express, and {counts.equal:,} have equal texts"
            )
        card = data_card(name, recipe, negatives, writer, counts, conversational)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    log.info("export: %s pairs of %s groups written to %s", f"{writer.rows:,}", f"{counts.groups:,}", out)
    _warn(counts, conversational)


def _warn(counts: PairCounts, conversational: bool) -> None:
    """Log which pairs are omitted, and how many texts TRL tokenizes otherwise."""
    if counts.endless:
        log.warning(
            "export: %s pairs are omitted: one of their texts does not end (cut at a token limit), which this format "
            "cannot express", f"{counts.endless:,}",
        )  # fmt: skip
    if counts.equal:
        log.warning("export: %s pairs are omitted: their texts are equal, in other token ids", f"{counts.equal:,}")
    if counts.other_ids:
        reason = "it tokenizes them together with their prompt, and a sampled text may have other ids than its sample"
        if conversational:
            reason = (
                "it renders messages by the tokenizer's chat template; either the recipe's data.template is another, "
                "or the chat template changes the texts"
            )
        log.warning("export: TRL will give %s of %s texts other token ids than they have here: %s",
                    f"{counts.other_ids:,}", f"{counts.texts:,}", reason)  # fmt: skip
