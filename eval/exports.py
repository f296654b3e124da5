"""What a run writes beside its report: the figures as Markdown to paste, the outputs as AlpacaEval reads them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpo_pipe.data import atomic
from cpo_pipe.data.recipe import GROUND_TRUTH
from cpo_pipe.eval.report import SHARED_NOTE, ReportData, agreement_rows, marked_grids


def write_exports(folder: Path, data: ReportData) -> None:
    """Write `metrics.md`, `model_outputs/SYSTEM/DECODING.json` and the targets, each complete or absent."""
    atomic.write_bytes(folder / "metrics.md", "\n".join(_markdown(data)).encode())
    prompts = data.examples.select(["prompt", "category"]).to_pylist()
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for row in data.outputs.to_pylist():
        texts.setdefault((row["system"], row["decoding"]), {})[row["example_id"]] = row["text"]
    ids = data.examples["example_id"].to_pylist()
    written = {Path(system) / decoding: [of[example_id] for example_id in ids]
               for (system, decoding), of in texts.items()}  # fmt: skip
    for name, outputs in {Path(GROUND_TRUTH): data.examples["target"].to_pylist(), **written}.items():
        rows = [
            {"instruction": prompt["prompt"], "output": output, "generator": str(name),
             "dataset": prompt["category"] or data.run}
            for prompt, output in zip(prompts, outputs, strict=True)
        ]  # fmt: skip
        path = folder / "model_outputs" / name.with_name(f"{name.name}.json")
        atomic.write_bytes(path, json.dumps(rows, indent=1, ensure_ascii=False).encode(errors="replace"))


def _markdown(data: ReportData) -> Iterator[str]:
    yield f"{data.examples.num_rows} held-out prompts; baseline: {data.baseline}; brackets are 95% intervals."
    for grid in marked_grids(data):
        yield f"\nDecoding: {grid.decoding}\n"
        yield _line(["metric", *grid.systems])
        yield _line(["---", *["---:"] * len(grid.systems)])
        yield from (_line([metric, *cells]) for metric, cells in grid.rows)
    if agreements := agreement_rows(data):
        yield "\nAgreement of judges\n"
        yield _line(["judges", "agreement", "kappa", "pairs"])
        yield _line(["---", "---:", "---:", "---:"])
        yield from (_line([name, *cells]) for name, cells in agreements)
    shared = [SHARED_NOTE] if not data.shared_metrics.isdisjoint(data.metrics["metric"].to_pylist()) else []
    yield from (f"\n{note}" for note in [*data.notes, *shared])
    yield ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
