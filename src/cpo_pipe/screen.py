"""Print tables, blocks and units; as plain text where the output is not a terminal."""

import time
from collections.abc import Sequence
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cpo_pipe.data.text import one_line, say


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = True) -> None:
    """Print rows of cells. Where the output is not a terminal, print aligned text, which other programs can parse.

    Args:
        columns: names; `>name` is aligned right.
        rows: the cells of each row.
        prose: the last column is prose: a terminal shows it below the first one.
    """
    if not rows:
        return
    rows = [["\n".join(map(one_line, cell.split("\n"))) for cell in row] for row in rows]
    names, right = [column.removeprefix(">") for column in columns], [column.startswith(">") for column in columns]
    console = Console()
    if console.is_terminal:
        _print_rich(console, names, right, rows, prose)
        return
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in [[name.upper() for name in names], *rows]:
        cells = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        say("  ".join(cells).rstrip())


def _print_rich(
    console: Console, names: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]], prose: bool
) -> None:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for place, name in enumerate(names[:-1] if prose else names):
        widest = max(len(part) for row in rows for part in row[place].split("\n"))
        table.add_column(name, justify="right" if right[place] else "left", min_width=widest, overflow="fold")
    for row in rows:
        if prose:
            first, *cells, words = row
            table.add_row(Text.assemble(first, "\n", (words, "dim")), *map(Text, cells))
        else:
            table.add_row(*map(Text, row))
    # The terminal wraps a table that is wider than itself; nothing is cut.
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    console.print(table, width=max(needed, console.width), crop=False)


def print_block(title: str, content: Any) -> None:
    """Print JSON values under a title as YAML, with control characters escaped."""
    if title:
        say()
        Console(soft_wrap=True).print(Text(one_line(title), style="bold"))
    text = yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=float("inf")
    )
    say(text.removesuffix("...\n").removesuffix("\n"))


class _Dumper(yaml.SafeDumper):
    """Write lists of plain values on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, not any(isinstance(part, dict | list) for part in sequence))


def cut(text: str, length: int) -> str:
    """Return a text, cut after `length` characters."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(size: float) -> str:
    """Return a size with its unit, without a space, so that spaces separate columns."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g}{units[0]}"


def megabytes(size: int) -> int:
    """Return a size in megabytes, rounded up."""
    return -(-size // 10**6)


def time_text(seconds: float | None) -> str:
    """Return a time given in seconds since 1970, in local time."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def abridged(value: Any) -> Any:
    """Return a value of a row with long texts and lists cut."""
    if isinstance(value, str):
        return cut(value, 200)
    if isinstance(value, dict):
        return {key: abridged(part) for key, part in value.items()}
    if isinstance(value, list) and len(value) > 12 and not isinstance(value[0], dict):
        return [*value[:10], f"… ({len(value):,})"]
    return [abridged(part) for part in value] if isinstance(value, list) else value
