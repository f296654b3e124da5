"""Rejected rows: how many are too many, and where to look at them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.text import one_line

NAMED_REASONS = 3
"""Number of reasons that the message about too many rejected rows gives an example of."""


def check_rejected(
    limit: float,
    source: str,
    reasons: Mapping[str, int],
    kept: int,
    rejected: Sequence[Mapping[str, Any]],
    file: Path | None,
) -> None:
    """Refuse a source with too many rejected rows.

    Args:
        limit: the largest share of rejected rows, `data.max_rejected`.
        source: the key and name of the source.
        reasons: rejected rows by reason.
        kept: rows that were not rejected.
        rejected: the rejected rows.
        file: where they are written; None: nowhere.

    Raises:
        InputError: the share of rejected rows exceeds the limit.
    """
    count = sum(reasons.values())
    if count > limit * (kept + count):
        raise InputError(
            f"{source}: {count:,} of {kept + count:,} rows were rejected ({listed_counts(reasons)}), more "
            f"than data.max_rejected {limit:g} allows; {places(rejected, file)}; correct them or raise the limit"
        )


def places(rejected: Sequence[Mapping[str, Any]], file: Path | None) -> str:
    """Return where to look: the first row of each of the most frequent reasons, and the file that has all of them."""
    first = {row["reason"]: row for row in reversed(rejected)}
    frequent = [reason for reason, _ in Counter(row["reason"] for row in rejected).most_common(NAMED_REASONS)]
    rows = [f"{first[reason]['source']} ({reason}: {one_line(first[reason]['detail'], 120)})" for reason in frequent]
    return f"see {', '.join(rows)}{f'; all of them are in {file}' if file is not None else ''}"


def listed_counts(reasons: Mapping[str, int]) -> str:
    """Return counts by reason as messages show them."""
    return ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
