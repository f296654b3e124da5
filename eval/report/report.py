"""The report: one HTML file that needs nothing but itself.

The template engine escapes all text of models and data; the page's content security policy runs only its own script.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from cpo_pipe.data.progress import duration_text
from cpo_pipe.data.store import atomic
from cpo_pipe.data.text import visible
from cpo_pipe.eval.metrics.differences import NOTICEABLE
from cpo_pipe.eval.report.charts import Bar, Chart, Point, alpha_curves, quality_charts, training_curves, win_rates
from cpo_pipe.eval.report.data import ReportData
from cpo_pipe.eval.report.examples import pack
from cpo_pipe.eval.report.leaderboard import Cell
from cpo_pipe.eval.report.tables import (
    PUBLISHED_NOTE,
    SHARED_NOTE,
    agreement_table,
    descriptions,
    difference_tables,
    grids,
    leakage_table,
    marked,
    published_tables,
    quality_table,
)
from cpo_pipe.pipeline.prepare.leakage import leakage_warnings


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one HTML file, complete or absent."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    folder = files("cpo_pipe.eval.report")
    source, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.html.j2", "report.css", "report.js")
    )
    quality, quality_meanings = quality_table(data.quality) if data.quality is not None else (None, {})
    packed, packed_count = pack(data.examples, data.outputs, data.verdicts, data.scores)
    html = environment.from_string(source).render(
        data=data,
        leaderboards=[(board, [_bars(column.cells) for column in board.columns]) for board in data.leaderboards],
        grids=grids(data),
        meanings=descriptions(data),
        shared_note="" if data.shared_metrics.isdisjoint(data.metrics["metric"].to_pylist()) else SHARED_NOTE,
        charts=[*_win_charts(data), *_alpha_charts(data)],
        differences=difference_tables(data),
        agreements=agreement_table(data),
        published=published_tables(data),
        published_note=PUBLISHED_NOTE,
        noticeable=NOTICEABLE,
        training_chart=training_curves(data.trainings),
        leakage=leakage_table(data.leakage),
        stages=[
            (stage.name, [duration_text(stage.seconds), duration_text(stage.total_seconds), stage.spent or "–"])
            for stage in data.stages
        ],
        leakage_notes=list(leakage_warnings(data.leakage)),
        quality=quality,
        quality_meanings=quality_meanings,
        quality_charts=quality_charts(data.quality) if data.quality is not None else [],
        packed=packed,
        packed_count=packed_count,
        grouped=group_cards(data),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    atomic.write_bytes(path, html.encode())


def _bars(cells: Sequence[Cell]) -> list[tuple[float, ...] | None]:
    """Return each cell's value and the ends of its interval, in percent of the column's width; None without a value.

    Without an interval both ends are the value.
    """
    ends = [end for cell in cells for end in (cell.value, cell.low, cell.high) if end is not None]
    start, width = (min(ends), max(ends) - min(ends)) if ends else (0.0, 0.0)

    def place(value: float) -> float:
        return 100 * (value - start) / width if width else 50.0

    return [
        None
        if cell.value is None
        else tuple(place(cell.value if end is None else end) for end in (cell.value, cell.low, cell.high))
        for cell in cells
    ]


def _visible(value: Any) -> Any:
    """Return a value as the page shows it: text without control characters; our own markup does not change."""
    return visible(value) if type(value) is str else value


def _win_charts(data: ReportData) -> Iterator[Chart]:
    """Yield a chart per win rate; ensembles have charts of their own."""
    members = {system for points in data.ensembles.values() for _, system in points}
    rates = [row for row in data.metrics.to_pylist() if " win rate" in row["metric"]]
    for metric in dict.fromkeys(row["metric"] for row in rates):
        panels: dict[str, list[Bar]] = {}
        for row in rates:
            if row["metric"] == metric and row["system"] not in members:
                bar = Bar(row["system"], row["value"], row["ci_low"], row["ci_high"])
                panels.setdefault(row["decoding"], []).append(bar)
        if panels:
            yield win_rates(marked(metric, data), metric.partition(" against ")[2] or data.baseline, panels)


def _alpha_charts(data: ReportData) -> Iterator[Chart]:
    """Yield a chart of each win rate and of MAUVE against the ensembles' α."""
    rows = {(row["metric"], row["system"], row["decoding"]): row for row in data.metrics.to_pylist()}
    decodings = list(dict.fromkeys(decoding for _, _, decoding in rows))
    for metric in dict.fromkeys(metric for metric, _, _ in rows):
        if " win rate" not in metric and metric != "MAUVE":
            continue
        curves = [
            (f"{ensemble}, {decoding}", points)
            for ensemble, members in data.ensembles.items()
            for decoding in decodings
            if (points := list(_points(rows, metric, members, decoding)))
        ]
        if curves:
            spread = ", ± standard deviation over seeds" if metric == "MAUVE" else ""
            yield alpha_curves(f"{marked(metric, data)} of ensembles{spread}", curves)


def _points(
    rows: Mapping[tuple[str, str, str], Mapping[str, Any]],
    metric: str,
    members: Sequence[tuple[float, str]],
    decoding: str,
) -> Iterator[Point]:
    for alpha, system in members:
        if row := rows.get((metric, system, decoding)):
            low, high = row["ci_low"], row["ci_high"]
            if spread := rows.get((f"{metric} sd", system, decoding)):
                low, high = row["value"] - spread["value"], row["value"] + spread["value"]
            yield alpha, row["value"], low, high


def group_cards(data: ReportData) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return training prompts (EXAMPLES schema) with their negatives (candidates of the GROUPS schema) by rank."""
    if data.group_examples is None or data.groups is None:
        return []
    columns = data.group_examples.select(["example_id", "rendered", "target"])
    examples = {row["example_id"]: row for row in columns.to_pylist()}
    cards = []
    for group in data.groups.to_pylist():
        negatives = [candidate for candidate in group["candidates"] if candidate["strategy"] != "target"]
        negatives.sort(key=lambda negative: negative["rank"] or 0)
        cards.append((examples[group["example_id"]], negatives))
    return cards
