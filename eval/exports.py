"""What a run writes beside its report: the figures as Markdown to paste, the outputs as AlpacaEval reads them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cpo_pipe.data import atomic
from cpo_pipe.data.recipe import GROUND_TRUTH
from cpo_pipe.data.text import markdown
from cpo_pipe.eval.report import PUBLISHED_NOTE, SHARED_NOTE, ReportData, agreement_rows, marked_grids, published_tables

_TARGETS = (GROUND_TRUTH, "targets")
"""Folder and file of the targets; no system can be called so."""


def write_exports(folder: Path, data: ReportData) -> list[Path]:
    """Write `metrics.md` and `model_outputs/SYSTEM/DECODING.json`, each complete or absent; return the files."""
    figures = folder / "metrics.md"
    atomic.write_bytes(figures, "\n".join(_markdown(data)).encode())
    outputs = folder / "model_outputs"
    written = set(_write_outputs(outputs, data))
    for path in set(outputs.glob("*/*.json")) - written:  # of systems and decodings that the run no longer has
        if _is_ours(path):
            path.unlink()
            with suppress(OSError):  # the user may keep files there
                path.parent.rmdir()
    return [figures, *sorted(written)]


def _is_ours(path: Path) -> bool:
    """Whether a file is outputs as they are written here, and nothing of the user's."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        return False
    name = f"{path.parent.name}/{path.stem}"
    return (
        isinstance(rows, list)
        and bool(rows)
        and all(isinstance(row, dict) and row.get("generator") == name for row in rows)
    )


def _write_outputs(folder: Path, data: ReportData) -> Iterator[Path]:
    """Write the outputs, and the targets as if a system had written them, as AlpacaEval reads them; gives the files."""
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
    yield f"{data.examples.num_rows} held-out prompts; baseline: {data.baseline}; brackets are 95% intervals."
    for grid in marked_grids(data):
        yield f"\nDecoding: {grid.decoding}\n"
        yield _line(["metric", *grid.systems])
        yield _rule(len(grid.systems))
        yield from (_line([metric, *cells]) for metric, cells in grid.rows)
    for table in published_tables(data):
        yield f"\n{markdown(table.title)}\n"
        yield _line(["system", "published", "this run"])
        yield _rule(2)
        yield from (_line([name, *cells]) for name, cells in table.rows)
    if data.published:
        yield f"\n{PUBLISHED_NOTE}"
    if agreements := agreement_rows(data):
        yield "\nAgreement of judges\n"
        yield _line(["judges", "agreement", "kappa", "pairs"])
        yield _rule(3)
        yield from (_line([name, *cells]) for name, cells in agreements)
    shared = [SHARED_NOTE] if not data.shared_metrics.isdisjoint(data.metrics["metric"].to_pylist()) else []
    yield from (f"\n{markdown(note)}" for note in [*data.notes, *shared])
    yield ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown, cells))} |"


def _rule(figures: int) -> str:
    """Return the line between the head of a table and its rows: a name, and figures set to the right."""
    return f"| --- |{' ---: |' * figures}"
