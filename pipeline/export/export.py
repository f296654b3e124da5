"""Command `export`: groups as preference data for TRL's DPOTrainer and others: prompt, chosen, rejected."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.examples import Examples
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models.templates import CHAT
from cpo_pipe.data.output_folder import new_folder
from cpo_pipe.data.progress import track
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.export.card import CHAT_TEMPLATE, data_card
from cpo_pipe.pipeline.export.messages import MessageWriter
from cpo_pipe.pipeline.export.pairs import EXAMPLE_COLUMNS, Pair, PairCounts, Write, pair_rows
from cpo_pipe.pipeline.export.trl_tokens import as_texts
from cpo_pipe.pipeline.export.writer import JSON_MESSAGES, MESSAGES, PairWriter, pair_schema
from cpo_pipe.pipeline.negatives.config import Negatives

log = logging.getLogger(__name__)

SLICE = 512
"""Groups that are read together."""


def export(
    out: Path,
    name: str,
    recipe: str,
    tokenizer_name: str | None,
    negatives: Negatives,
    examples: Examples,
    selection: pa.Table,
    groups: Rows,
    pairs: Sequence[Pair],
    conversational: bool | None,
) -> None:
    """Write groups to a folder as preference data, with a data card.

    Args:
        out: a folder that is new or empty.
        name: title of the data set, in its card.
        recipe: the recipe of the groups as YAML; it goes into the card.
        tokenizer_name: of the examples, as TRL's user can load it; None: it has no name.
        negatives: what the groups are made of.
        examples: what the groups' examples are part of.
        selection: the examples whose groups are written (EXAMPLES schema).
        groups: the groups.
        pairs: labels of the pairs; empty: the target with each of the negatives.
        conversational: whether texts are written as messages, and prompts as before the template; None: where the
            template is `chat`.

    Raises:
        InputError: `out` is not empty, or no pair can be written.
    """
    tokenizer, counts, rendering = examples.tokenizer.load(), PairCounts(), examples.rendering
    if conversational is None:
        conversational = rendering["template"] == CHAT
    if conversational and not tokenizer.chat_template:
        log.warning("export: the tokenizer of the examples has no chat template; TRL needs one to render messages")
    write: Write = partial(as_texts, tokenizer=tokenizer)
    schema, settings, chat_template = pair_schema(pa.string()), {}, None
    if conversational:
        settings = {key: rendering[key] for key in ("chat_template_kwargs",) if key in rendering}
        messages = MessageWriter(tokenizer, rendering, selection)
        chat_template = messages.chat_template
        write, text = messages.write, JSON_MESSAGES if messages.has_more else MESSAGES
        schema = pair_schema(text, messages.has_tools, bool(settings))
    with new_folder(out) as scratch:
        writer = PairWriter(scratch / "data", schema)
        with track("export", selection.num_rows, "groups") as meter:
            start = 0
            for part in groups.batches(selection["example_id"], SLICE):
                own = selection.slice(start, part.num_rows).select(EXAMPLE_COLUMNS).to_pylist()
                start += part.num_rows
                found = pair_rows(part.to_pylist(), own, pairs, write, tokenizer, counts)
                writer.write([{**row, **settings} for row in found])
                meter.advance(part.num_rows)
        writer.close()
        if not writer.rows:
            raise InputError(
                f"--out {out}: no pair to write: {counts.endless:,} have a text that does not end (cut at a token "
                f"limit), which this format cannot express, and {counts.equal:,} have equal texts"
            )
        if chat_template is not None:
            (scratch / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        card = data_card(
            name, recipe, tokenizer_name, negatives, writer, counts, conversational, chat_template is not None
        )
        (scratch / "README.md").write_text(card, encoding="utf-8")
    kind = "messages" if conversational else "texts"
    log.info("export: %s pairs of %s groups written to %s as %s", f"{writer.rows:,}", f"{counts.groups:,}", out, kind)
    _warn(counts, conversational, rendering)


def _warn(counts: PairCounts, conversational: bool, rendering: Spec) -> None:
    """Log which pairs are omitted, and how many texts TRL tokenizes otherwise."""
    if counts.endless:
        log.warning(
            "export: %s pairs are omitted: one of their texts does not end (cut at a token limit), which this format "
            "cannot express", f"{counts.endless:,}",
        )  # fmt: skip
    if counts.equal:
        log.warning("export: %s pairs are omitted: their texts are equal, in other token ids", f"{counts.equal:,}")
    if other := counts.other_ids:
        reason = "it tokenizes them together with their prompt, and a sampled text may have other ids than its sample"
        if rendering["template"] != CHAT and conversational:
            reason = "it renders messages by the tokenizer's chat template; data.template is another"
        elif "chat_date" in rendering and conversational:
            reason = f"the chat template prints the day of the rendering, which is {rendering['chat_date']} here"
        elif conversational:
            reason = "a sampled text may begin or end otherwise than the chat template writes, or have other ids"
        elif rendering["template"] == CHAT:
            reason += "; it ends them in the EOS token, not as the chat template does: use --conversational"
        log.warning("export: TRL will give %s of %s texts other token ids than they have here: %s",
                    f"{other:,}", f"{counts.texts:,}", reason)  # fmt: skip
