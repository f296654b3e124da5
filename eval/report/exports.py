"""The files beside a report: the metrics as Markdown, and the outputs in the format of AlpacaEval."""

import json
from collections.abc import Iterator
from pathlib import Path

from cpo_pipe.data.store import atomic
from cpo_pipe.data.text import markdown
from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.report.data import ReportData
from cpo_pipe.eval.report.tables import PUBLISHED_NOTE, SHARED_NOTE, TextTable, agreement_table, grids, published_tables

_TARGETS = (GROUND_TRUTH, "targets")
"""Folder and file of the targets; no system can have this name."""


def write_exports(folder: Path, data: ReportData) -> list[Path]:
    """Write `metrics.md` and `model_outputs/SYSTEM/DECODING.json`, each complete or absent; return the files."""
    figures = folder / "metrics.md"
    atomic.write_bytes(figures, "\n".join(_markdown(data)).encode())
    return [figures, *sorted(_write_outputs(folder / "model_outputs", data))]


def _write_outputs(folder: Path, data: ReportData) -> Iterator[Path]:
    """Write the outputs, and the targets as another system, in the format of AlpacaEval; yield the files."""
    prompts = data.examples.select(["prompt", "category"]).to_pylist()
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for row in data.outputs.to_pylist():
        texts.setdefault((row["system"], row["decoding"]), {})[row["example_id"]] = row["text"]
    ids = data.examples["example_id"].to_pylist()
    written = {of: [found[example_id] for example_id in ids] for of, found in texts.items()}
    for of, outputs in {_TARGETS: data.examples["target"].to_pylist(), **written}.items():
        generator = GROUND_TRUTH if of == _TARGETS else "/".join(of)
        rows = [
            {"instruction": prompt["prompt"], "output": output, "generator": generator,
             "dataset": prompt["category"] or data.run}
            for prompt, output in zip(prompts, outputs, strict=True)
        ]  # fmt: skip
        system, decoding = of
        path = folder / system / f"{decoding}.json"
        atomic.write_bytes(path, json.dumps(rows, indent=1, ensure_ascii=False).encode(errors="replace"))
        yield path


def _markdown(data: ReportData) -> Iterator[str]:
    if data.verdict is not None:
        yield f"{markdown(data.verdict.sentence)}\n"
    yield f"{data.examples.num_rows} held-out prompts; baseline: {data.baseline}; brackets are 95% intervals."
    for grid in grids(data):
        yield from _table("metric", grid)
    for published in published_tables(data):
        yield from _table("system", published)
    if data.published:
        yield f"\n{PUBLISHED_NOTE}"
    if (agreements := agreement_table(data)).rows:
        yield from _table("judges", agreements)
    shared = [] if data.shared_metrics.isdisjoint(data.metrics["metric"].to_pylist()) else [SHARED_NOTE]
    yield from (f"\n{markdown(note)}" for note in [*data.notes, *shared])
    yield ""


def _table(first: str, table: TextTable) -> Iterator[str]:
    """Yield the lines of a table, `first` heading its first column; numbers are aligned right."""
    yield f"\n{markdown(table.title)}\n"
    lines = [(first, *table.columns), *((name, *cells) for name, cells in table.rows)]
    head, *rows = (f"| {' | '.join(map(markdown, line))} |" for line in lines)
    yield head
    yield f"| --- |{' ---: |' * len(table.columns)}"
    yield from rows
