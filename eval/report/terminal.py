"""The main metrics, and the quality of the negatives, on the terminal."""

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cpo_pipe.data.text import say
from cpo_pipe.eval.judges.base import ScoreMetric
from cpo_pipe.eval.report.tables import DAGGER, LEAKAGE_COLUMNS, SHARED_NOTE, Grid, grids, leakage_rows, quality_table

MAIN_METRICS = ("rep-4", "chrF", "target NLL", "MAUVE")
"""Shown on the terminal, beside win rates and some scores of judges; the report has all metrics."""

_NUMBER = re.compile(r"[0-9]+\.[0-9]+")


def print_table(
    metrics: pa.Table,
    baseline: str,
    shared_metrics: AbstractSet[str],
    score_metrics: Sequence[ScoreMetric] = (),
    notes: Sequence[str] = (),
) -> None:
    """Print the main metrics, a table per decoding and a line per system."""
    console = Console()
    main = {*MAIN_METRICS, *(metric.name for metric in score_metrics if metric.on_terminal)}
    for grid in grids(metrics):
        columns = dict(_columns(grid, main, shared_metrics))
        title = f"{grid.decoding} decoding, against {baseline}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", overflow="fold", min_width=_widest_line(columns[name]))
        for row, system in enumerate(grid.systems):
            table.add_row(system, *(cells[row] for cells in columns.values()))
        _print(console, table)
    for note in [*notes, *([] if shared_metrics.isdisjoint(metrics["metric"].to_pylist()) else [SHARED_NOTE])]:
        say(note)


def print_quality(table: pa.Table, notes: Sequence[str] = ()) -> None:
    """Print the quality of the negatives, a column per strategy."""
    console = Console(markup=False, highlight=False)
    shown = quality_table(table)
    grid = Table(title="Quality of the negatives", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    grid.add_column("", no_wrap=True, min_width=_widest_line([figure for figure, _ in shown.rows]))
    for column, name in enumerate(shown.strategies):
        cells = [cells[column] for _, cells in shown.rows]
        grid.add_column(name, justify="right", overflow="fold", min_width=_widest_line([*cells, name[:15]]))
    for figure, cells in shown.rows:
        grid.add_row(figure, *cells)
    _print(console, grid)
    for note in notes:
        say(note)


def print_leakage(figures: Sequence[Mapping[str, Any]]) -> None:
    """Print the overlap of held-out examples with training examples (rows of LEAKAGE), a line per split and part."""
    if not figures:
        return
    title = "Overlap with training examples"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    rows = leakage_rows(figures)
    grid.add_column("", no_wrap=True, min_width=_widest_line([name for name, _ in rows]))
    for column, heading in enumerate(LEAKAGE_COLUMNS):
        width = _widest_line([heading, *(cells[column] for _, cells in rows)])
        grid.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for name, cells in rows:
        grid.add_row(name, *cells)
    _print(Console(markup=False, highlight=False), grid)


def _print(console: Console, table: Table) -> None:
    """Print a table; one that is wider than the terminal is wrapped by it, never cut."""
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    screen, console.width = console.width, max(needed, console.width)  # a width given to print would be cut to it
    console.print(table, crop=False)
    console.width = screen


def _widest_line(cells: Sequence[str]) -> int:
    """Return the width of the longest line: numbers are never broken, headings may be."""
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _columns(grid: Grid, main: AbstractSet[str], shared_metrics: AbstractSet[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield columns that fit on a screen: intervals only of win rates; wins, ties and losses in one column."""
    rows = dict(grid.rows)
    for metric, cells in rows.items():
        judge, _, figure = metric.rpartition(" ")
        dagger = DAGGER if metric in shared_metrics else ""
        if figure == "win":
            parts = zip(*(rows[f"{judge} {part}"] for part in ("win", "tie", "loss")), strict=True)
            yield f"{judge} {dagger}\nW/T/L %", [_percentages(part) for part in parts]
        elif metric.endswith(" win rate"):
            percent = [_NUMBER.sub(_as_percentage, cell) for cell in cells]
            yield f"{judge.removesuffix(' win')} {dagger}\nwin rate %", [cell.replace(" [", "\n[") for cell in percent]
        elif metric in main:
            yield f"{metric}{dagger}", [cell.partition(" [")[0].replace(" ± ", "\n± ") for cell in cells]


def _as_percentage(share: re.Match[str]) -> str:
    return f"{100 * float(share[0]):.0f}"


def _percentages(shares: Sequence[str]) -> str:
    return "–" if "–" in shares else "/".join(f"{100 * float(share.split()[0]):.0f}" for share in shares)
