"""The ranked systems, the answer, and the quality of the negatives, on the terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cpo_pipe.data.text import say_prose
from cpo_pipe.eval.report.leaderboard import DAGGER, Cell, Leaderboard
from cpo_pipe.eval.report.tables import SHARED_NOTE, leakage_table, quality_table

NARROW = 80
"""Columns of a screen that every table fits; metrics that do not are left to the report."""
LONGEST_NAME = 18
"""Characters of a system's name before it is broken."""


def print_leaderboards(tables: Sequence[Leaderboard], baseline: str, notes: Sequence[str] = ()) -> None:
    """Print the ranked table of each decoding, with the metrics that fit the screen, and the notes."""
    console = Console(markup=False, highlight=False)
    for shown in tables:
        title = f"{shown.decoding}, {baseline} is the baseline"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold", width=min(LONGEST_NAME, _widest_line(shown.systems)))
        for number, column in enumerate(shown.columns):
            cells = [_cell(cell, with_interval=not number) for cell in column.cells]
            heading = f"{column.title} {column.direction}"
            width = max(_widest_line(cells), *map(len, heading.split()))
            table.add_column("\n".join(textwrap.wrap(heading, width)), justify="right", no_wrap=True, min_width=width)
            if number and _width(console, table) > max(console.width, NARROW):
                table.columns.pop()
                break
        for row, system in enumerate(shown.systems):
            cells = [_cell(column.cells[row], with_interval=not number) for number, column in enumerate(shown.columns)]
            table.add_row(system, *cells[: len(table.columns) - 1])
        _print(console, table)
    if any(cell.significant for shown in tables for column in shown.columns for cell in column.cells):
        say_prose(f"* differs significantly from {baseline}")
    shared = any(column.title.endswith(DAGGER) for shown in tables for column in shown.columns)
    for note in [*notes, *([SHARED_NOTE] if shared else [])]:
        say_prose(note)


def _cell(cell: Cell, with_interval: bool) -> str:
    star = "*" if cell.significant else ""
    return f"{cell.text}{star}" + (f" {cell.interval}" if with_interval and cell.interval else "")


def print_quality(table: pa.Table, notes: Sequence[str] = ()) -> None:
    """Print the quality of the negatives, a column per strategy."""
    console = Console(markup=False, highlight=False)
    shown, _ = quality_table(table)
    grid = Table(title=shown.title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    grid.add_column("", no_wrap=True, min_width=_widest_line([figure for figure, _ in shown.rows]))
    for column, name in enumerate(shown.columns):
        cells = [cells[column] for _, cells in shown.rows]
        grid.add_column(name, justify="right", overflow="fold", min_width=_widest_line([*cells, name[:15]]))
    for figure, cells in shown.rows:
        grid.add_row(figure, *cells)
    _print(console, grid)
    for note in notes:
        say_prose(note)


def print_leakage(figures: Sequence[Mapping[str, Any]]) -> None:
    """Print the overlap of held-out examples with training examples (rows of LEAKAGE), a line per split and part."""
    if not figures:
        return
    shown = leakage_table(figures)
    grid = Table(title=shown.title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    grid.add_column("", no_wrap=True, min_width=_widest_line([name for name, _ in shown.rows]))
    for column, heading in enumerate(shown.columns):
        width = _widest_line([heading, *(cells[column] for _, cells in shown.rows)])
        grid.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for name, cells in shown.rows:
        grid.add_row(name, *cells)
    _print(Console(markup=False, highlight=False), grid)


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(width=10_000), table).minimum


def _print(console: Console, table: Table) -> None:
    """Print a table; one that is wider than the terminal is wrapped by it, never cut."""
    needed = _width(console, table)
    screen, console.width = console.width, max(needed, console.width)  # a width given to print would be cut to it
    console.print(table, crop=False)
    console.width = screen


def _widest_line(cells: Sequence[str]) -> int:
    """Return the width of the longest line: numbers are never broken, headings may be."""
    return max(len(line) for cell in cells for line in cell.split("\n"))
