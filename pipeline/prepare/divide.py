"""Divide the collected examples: near-duplicates stay on one side of the split, and leaks are counted or removed."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.pipeline.prepare.collect import ExampleCollector
from cpo_pipe.pipeline.prepare.leakage import PARTS, find_leaks
from cpo_pipe.pipeline.prepare.near_duplicates import near_duplicate_groups, with_keys
from cpo_pipe.pipeline.prepare.split import SPLITS, split_ends

log = logging.getLogger(__name__)

LARGE_GROUP = 0.1
"""Share of the examples in one group of near-duplicates above which this group decides the split."""
SMALL_GROUP = 10
"""Prompts of a group that is never too large."""


def divide(
    collector: ExampleCollector, config: Data, official: set[str], facts: dict[str, Any]
) -> dict[str, Sequence[int]]:
    """Return the examples of each split, as places in the collector's `keys`.

    Args:
        collector: the examples. Near-duplicates and leaks are removed where the recipe wants that.
        config: the section.
        official: splits that have a source of their own.
        facts: takes the number of `near_duplicates` and the `leakage` (rows of LEAKAGE).

    Raises:
        InputError: there are too few examples for the splits.
    """
    rows = collector.collected()
    groups = {part: near_duplicate_groups(f"{part}s", rows[part], config.near_duplicate_similarity) for part in PARTS}
    keys = [key for key, _ in collector.keys]
    labels = with_keys(groups["prompt"], keys).tolist()
    if config.near_duplicates == "group":
        collector.group(labels)
    elif config.near_duplicates == "drop":
        later = {row: int(first) for row, first in enumerate(groups["prompt"]) if keys[row] != keys[first]}
        collector.remove("near-duplicate", {
            row: f"its prompt is a near-duplicate of that of {rows['place'][first].as_py()}"
            for row, first in later.items() if collector.is_drawn(row)
        })  # fmt: skip
    facts["near_duplicates"] = _near_duplicates(labels, keys)
    splits = _split(collector, config, official)
    while True:  # without some training examples, others' n-grams may be rare enough to count
        leaks = {part: find_leaks(part, rows[part], rows["place"], splits, groups[part]) for part in PARTS}
        if not config.drop_leaks or not any(found.training for found in leaks.values()):
            break
        for part, found in leaks.items():
            collector.remove(f"leaked {part}", {
                row: f"{kind}: its {part} and that of {rows['place'][held].as_py()}"
                for row, (kind, held) in found.training.items()
            })  # fmt: skip
        splits["train"] = [row for row in splits["train"] if row not in collector.removed]
    if not splits["train"]:
        raise InputError("data.drop_leaks: all training examples overlap with held-out examples; set it to false")
    figures = [row for found in leaks.values() for row in found.figures]
    facts["leakage"] = sorted(figures, key=lambda row: SPLITS.index(row["split"]))
    return splits


def _split(collector: ExampleCollector, config: Data, official: set[str]) -> dict[str, Sequence[int]]:
    """Return the examples of each split: those of official splits, and those that are drawn."""
    train, validation, test = config.split_sizes()
    asked = {"validation": validation, "test": test}
    drawn = collector.ordered(None)
    ends = split_ends(
        [collector.keys[row][0] for row in drawn],
        train,
        0 if "validation" in official else validation,
        0 if "test" in official else test,
    )
    splits: dict[str, Sequence[int]] = {
        name: drawn[start:end] for name, start, end in zip(SPLITS, (0, *ends), ends, strict=False)
    }
    for name in official:
        splits[name] = collector.ordered(name)[: asked[name] or None]
        if not splits[name]:
            raise InputError(f"data.{name}_source: no examples are left, all of its rows were rejected; correct them")
    for name, wanted in asked.items():
        if wanted and len(splits[name]) < wanted:  # rows were rejected, or equal prompts moved a boundary
            log.warning(
                "examples: data.%s is %s, but only %s are left for it", name, f"{wanted:,}", f"{len(splits[name]):,}"
            )
    return splits


def _near_duplicates(labels: Sequence[int], keys: Sequence[str]) -> dict[str, int]:
    """Return how many prompts have a near-duplicate, and how many are in the largest group; equal ones count once."""
    sizes = Counter(label for label, _ in set(zip(labels, keys, strict=True)))
    return {
        "prompts": sum(size for size in sizes.values() if size > 1),
        "largest": max(sizes.values(), default=0),
        "of": sizes.total(),
    }


def near_duplicate_note(facts: Mapping[str, Any]) -> str:
    """Return a sentence about a group of near-duplicates that is too large to be some copies; or an empty string."""
    found = facts["near_duplicates"]
    if found["largest"] <= max(LARGE_GROUP * found["of"], SMALL_GROUP):
        return ""
    return (
        f"{found['largest']:,} of {found['of']:,} prompts are near-duplicates of each other, so they are in one split "
        "(data.near_duplicates: group) or all but one are removed (drop); if they only share instructions, put these "
        "into data.template, raise data.near_duplicate_similarity, or set data.near_duplicates to keep"
    )
