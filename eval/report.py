"""The report: one HTML file that needs nothing but itself, and its main table for the terminal.

All text of models and data is escaped by the template engine; the page's policy lets only its own script run.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cpo_pipe.data import atomic
from cpo_pipe.eval.charts import Bar, Chart, quality_charts, training_curves, win_rates
from cpo_pipe.eval.measure import ANY_DECODING

MAX_EXAMPLES = 50
"""Examples shown, of the evaluation and of the groups each."""

DAGGER = " †"
SHARED_NOTE = (
    "† Measured with the same embedding model that ranked the negatives: what was trained on that ranking has an "
    "advantage here. Weigh it with the other figures."
)

MEANINGS = {
    "rep-4": "share of a text's 4-grams that repeat an earlier one, 0 to 1; nearer to the ground truth's is better",
    "distinct-2": "different 2-grams by all 2-grams of all outputs together, 0 to 1; low: the outputs are all alike",
    "length": "tokens of an output, without the one that ends it",
    "chrF": "mean sentence chrF2 against the target, 0 to 100; higher is better",
    "target NLL": "negative log-likelihood of the targets' tokens, nats per token; lower is better",
    "MAUVE": "likeness of all outputs to all targets, 0 to 1, ± standard deviation over k-means seeds, on sentence "
    "embeddings; higher is better; differences within the spread are noise",
    "exact match": "share of the outputs that are right; higher is better",
    "cosine to target": "mean cosine of an output's embedding to its target's, −1 to 1; higher is better",
}
_JUDGED = {
    "win": "share of the examples that the judge gives to the system",
    "tie": "share that it gives to neither",
    "loss": "share that it gives to the baseline",
    "win rate": "wins and half of the ties, 0 to 1; above 0.5 is better than the baseline",
}

# What has no shape of its own, or changes the direction of what follows it: shown by name instead of done.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

SCRIPT = """
const box = document.getElementById("search"), count = document.getElementById("found");
const cards = [...document.querySelectorAll("details.card")];
box.addEventListener("input", () => {
  const words = box.value.toLowerCase();
  let shown = 0;
  for (const card of cards) {
    card.hidden = !card.textContent.toLowerCase().includes(words);
    shown += !card.hidden;
  }
  count.textContent = words ? `${shown} of ${cards.length} shown` : "";
});
"""


# The figures of negatives, as shown: the first form that has all its columns.
_QUALITY = {
    "made": ("{made:,}",),
    "copies of the target": ("{copies:.1%}",),
    "duplicates": ("{duplicates:.1%}",),
    "without an end token": ("{unended:.1%}",),
    "kept": ("{kept:,}",),
    "groups with none kept": ("{alone:.1%}",),
    "tokens, mean": ("{tokens:.1f}",),
    "length by the target's, median": ("{length_ratio:.2f}",),
    "the longer is right": ("{longer:.0%}",),
    "the longest is right (chance)": ("{longest:.0%} ({chance:.0%})",),
    "the likelier is right": ("{likelier:.0%}",),
    "the likeliest is right (chance)": ("{likeliest:.0%} ({chance:.0%})",),
    "likelier per token is right": ("{likelier_per_token:.0%}",),
    "likeliest per token is right (chance)": ("{likeliest_per_token:.0%} ({chance:.0%})",),
    "reference log-prob, nats per token": ("{reference_logprob:.2f}",),
    "sampler log-prob, nats per token": ("{sampler_logprob:.2f}",),
    "cosine to the target, mean": ("{similarity:.2f}",),
    "cosine, quantiles 10/50/90%": ("{similarity_p10:.2f}/{similarity_p50:.2f}/{similarity_p90:.2f}",),
    **{
        f"distinct-{n} (the targets')": (f"{{distinct_{n}:.2f}} ({{target_distinct_{n}:.2f}})", f"{{distinct_{n}:.2f}}")
        for n in (1, 2, 3)
    },
}

_NUMBER = re.compile(r"[0-9]+\.[0-9]+")
_REPORT_ONLY = ("distinct-2", "length", "cosine to target")
"""Metrics that the table on the terminal leaves to the report."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a report shows."""

    identity: str
    """Hash of what decides all the rest."""
    run: str
    created: str
    """Date and time, as shown."""
    versions: Mapping[str, str]
    recipe: str
    """The resolved recipe, as YAML."""
    artifacts: Mapping[str, str]
    """Addresses in the store, by what they are."""
    baseline: str
    metrics: pa.Table
    """METRICS schema."""
    shared_metrics: AbstractSet[str]
    notes: Sequence[str]
    examples: pa.Table
    """The evaluated examples, in order (EXAMPLES schema)."""
    outputs: pa.Table
    """`example_id`, `system`, `decoding`, `text`."""
    trainings: Mapping[str, pa.Table] = field(default_factory=dict)
    """Step metrics, by training: `step`, and what of `loss`, `won`, `margin`, `target_logprob` there is."""
    quality: pa.Table | None = None
    """Figures of the negatives: a row per strategy, then `all` and `target`."""
    quality_notes: Sequence[str] = ()
    """What is wrong with the negatives, and what could not be measured of them."""
    group_examples: pa.Table | None = None
    """The examples of `groups` (EXAMPLES schema)."""
    groups: pa.Table | None = None
    """Some groups to show (GROUPS schema)."""


@dataclass(frozen=True)
class Grid:
    """The figures under one decoding: a row per metric, a column per system."""

    decoding: str
    systems: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Quality:
    """The figures of the negatives: a row per figure, a column per strategy."""

    strategies: list[str]
    rows: list[tuple[str, list[str]]]
    meanings: dict[str, str]
    charts: list[Chart]


@dataclass(frozen=True)
class Negative:
    """A ranked negative, as shown."""

    rank: int | None
    similarity: float | None
    strategy: str
    text: str


@dataclass(frozen=True)
class Card:
    """One prompt with all that was written for it."""

    prompt: str
    target: str
    outputs: list[tuple[str, str, str]]
    """System, decoding, text."""
    negatives: list[Negative]


def shows(path: Path, identity: str) -> bool:
    """Whether the report at `path` is the one of this identity."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'name="identity" content="{identity}"' in file.read(4096)


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one HTML file, complete or absent."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    source = files("cpo_pipe.eval").joinpath("report.html.j2").read_text(encoding="utf-8")
    evaluated, grouped = example_cards(data), group_cards(data)
    html = environment.from_string(source).render(
        data=data,
        grids=[_marked(grid, data) for grid in grids(data.metrics)],
        meanings=_meanings(data.metrics),
        shared_note=SHARED_NOTE if _shared_here(data.metrics, data.shared_metrics) else "",
        win_charts=list(_win_charts(data)),
        training_charts=[chart for name, steps in data.trainings.items() if (chart := training_curves(name, steps))],
        quality=_quality(data.quality) if data.quality is not None else None,
        evaluated=evaluated,
        grouped=grouped,
        script=SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )
    atomic.write_bytes(path, html.encode())


def print_table(metrics: pa.Table, baseline: str, shared_metrics: AbstractSet[str], notes: Sequence[str] = ()) -> None:
    """Show the main figures on the terminal, a table per decoding and a line per system; the report has them all."""
    console = Console()
    for grid in grids(metrics):
        columns = dict(_terminal_columns(grid, shared_metrics))
        title = f"{grid.decoding} decoding, against {baseline}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", overflow="fold", min_width=_widest_line(columns[name]))
        for row, system in enumerate(grid.systems):
            table.add_row(system, *(cells[row] for cells in columns.values()))
        _print(console, table)
    for note in [*notes, *([SHARED_NOTE] if _shared_here(metrics, shared_metrics) else [])]:
        console.print(note, markup=False, highlight=False)


def print_quality(table: pa.Table, notes: Sequence[str] = ()) -> None:
    """Show the figures of the negatives on the terminal, a column per strategy."""
    console = Console(markup=False, highlight=False)
    shown = _quality(table)
    grid = Table(title="Quality of the negatives", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    grid.add_column("", no_wrap=True, min_width=_widest_line([figure for figure, _ in shown.rows]))
    for column, name in enumerate(shown.strategies):
        cells = [cells[column] for _, cells in shown.rows]
        grid.add_column(name, justify="right", overflow="fold", min_width=_widest_line([*cells, name[:15]]))
    for figure, cells in shown.rows:
        grid.add_row(figure, *cells)
    _print(console, grid)
    for note in notes:
        console.print(note)


def _print(console: Console, table: Table) -> None:
    """Figures that need more room than the terminal has are wrapped by it, never cut."""
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    screen, console.width = console.width, max(needed, console.width)  # a width given to print would be cut to it
    console.print(table, crop=False)
    console.width = screen


def _widest_line(cells: Sequence[str]) -> int:
    """A figure is never broken; headings may be."""
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _terminal_columns(grid: Grid, shared_metrics: AbstractSet[str]) -> Iterator[tuple[str, list[str]]]:
    """Columns that fit on a screen: intervals only of the win rates, wins, ties and losses in one."""
    rows = dict(grid.rows)
    for metric, cells in rows.items():
        judge, _, figure = metric.rpartition(" ")
        dagger = DAGGER if metric in shared_metrics else ""
        if metric in _REPORT_ONLY or figure in ("tie", "loss"):
            continue
        if figure == "win":
            parts = zip(*(rows[f"{judge} {part}"] for part in ("win", "tie", "loss")), strict=True)
            yield f"{judge} {dagger}\nW/T/L %", [_percentages(part) for part in parts]
        elif metric.endswith(" win rate"):
            percent = [_NUMBER.sub(_as_percentage, cell) for cell in cells]
            yield f"{judge.removesuffix(' win')} {dagger}\nwin rate %", [cell.replace(" [", "\n[") for cell in percent]
        else:
            yield f"{metric}{dagger}", [cell.partition(" [")[0].replace(" ± ", "\n± ") for cell in cells]


def _as_percentage(share: re.Match[str]) -> str:
    return f"{100 * float(share[0]):.0f}"


def _percentages(shares: Sequence[str]) -> str:
    return "–" if "–" in shares else "/".join(f"{100 * float(share.split()[0]):.0f}" for share in shares)


def visible(text: str) -> str:
    r"""Text with its control and direction characters shown as `\x1b`, and lines ended as HTML ends them."""
    lines = text.replace("\r\n", "\n")
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), lines)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def grids(metrics: pa.Table) -> list[Grid]:
    """The figures by decoding; those that depend on none stand under each."""
    rows = metrics.to_pylist()
    systems = list(dict.fromkeys(row["system"] for row in rows))
    names = [name for name in dict.fromkeys(row["metric"] for row in rows) if name != "MAUVE sd"]
    decodings = [name for name in dict.fromkeys(row["decoding"] for row in rows) if name != ANY_DECODING]
    found = {(row["system"], row["decoding"], row["metric"]): row for row in rows}

    def cell(system: str, decoding: str, metric: str) -> str:
        row = found.get((system, decoding, metric)) or found.get((system, ANY_DECODING, metric))
        spread = found.get((system, decoding, "MAUVE sd")) if metric == "MAUVE" else None
        return _cell(row, spread) if row else "–"

    return [
        Grid(decoding, systems, [(metric, [cell(system, decoding, metric) for system in systems]) for metric in names])
        for decoding in decodings
    ]


def _cell(row: Mapping[str, Any], spread: Mapping[str, Any] | None) -> str:
    digits = 1 if row["metric"] in ("length", "chrF") else 3
    text = f"{row['value']:.{digits}f}"
    if spread is not None:
        text += f" ± {spread['value']:.{digits}f}"
    if row["ci_low"] is not None:
        text += f" [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"
    return text


def _marked(grid: Grid, data: ReportData) -> Grid:
    systems = [f"{system} (baseline)" if system == data.baseline else system for system in grid.systems]
    rows = [(metric + (DAGGER if metric in data.shared_metrics else ""), cells) for metric, cells in grid.rows]
    return Grid(grid.decoding, systems, rows)


def _shared_here(metrics: pa.Table, shared_metrics: AbstractSet[str]) -> bool:
    return not shared_metrics.isdisjoint(metrics["metric"].to_pylist())


def _meanings(metrics: pa.Table) -> dict[str, str]:
    names = dict.fromkeys(metrics["metric"].to_pylist())
    meanings = {name: MEANINGS[name] for name in names if name in MEANINGS}
    for name in names:
        judge, _, figure = name.partition(" ")
        if name not in MEANINGS and figure in _JUDGED:
            meanings[name] = f"{_JUDGED[figure]} (judge {judge})"
    return meanings


def _win_charts(data: ReportData) -> Iterator[Chart]:
    rates = [row for row in data.metrics.to_pylist() if row["metric"].endswith(" win rate")]
    for metric in dict.fromkeys(row["metric"] for row in rates):
        bars = [
            Bar(f"{row['system']}, {row['decoding']}", row["value"], row["ci_low"], row["ci_high"])
            for row in rates
            if row["metric"] == metric
        ]
        title = metric[0].upper() + metric[1:] + (DAGGER if metric in data.shared_metrics else "")
        yield win_rates(title, data.baseline, bars)


def _quality(table: pa.Table) -> Quality:
    """The figures that were measured; those of all strategies together only where there are several."""
    *strategies, together, target = ({**row, "strategy": visible(row["strategy"])} for row in table.to_pylist())
    columns = [*strategies, *([together] if len(strategies) > 1 else []), {**target, "strategy": "targets"}]
    rows = [(figure, [_first_form(forms, row) for row in columns]) for figure, forms in _QUALITY.items()]
    rows = [(figure, cells) for figure, cells in rows if set(cells) != {"–"}]
    docs = {name: (table.schema.field(name).metadata or {}).get(b"doc", b"").decode() for name in table.column_names}
    meanings = {figure: "; ".join(docs[name] for name in _names(_QUALITY[figure][0])) for figure, _ in rows}
    return Quality([row["strategy"] for row in columns], rows, meanings, quality_charts(strategies, together))


def _first_form(forms: Sequence[str], row: Mapping[str, Any]) -> str:
    return next((form.format(**row) for form in forms if all(row[name] is not None for name in _names(form))), "–")


def _names(form: str) -> list[str]:
    return re.findall(r"{(\w+)", form)


# ── examples ─────────────────────────────────────────────────────────────────────────────────────────────────────


def example_cards(data: ReportData) -> list[Card]:
    """The first evaluated prompts, with what each system wrote."""
    shown = data.examples.slice(0, MAX_EXAMPLES).select(["example_id", "rendered", "target"]).to_pylist()
    ids = {example["example_id"] for example in shown}
    written: dict[str, list[tuple[str, str, str]]] = {example_id: [] for example_id in ids}
    for row in data.outputs.to_pylist():
        if row["example_id"] in ids:
            written[row["example_id"]].append((row["system"], row["decoding"], row["text"]))
    return [Card(example["rendered"], example["target"], written[example["example_id"]], []) for example in shown]


def group_cards(data: ReportData) -> list[Card]:
    """The first training prompts, with their ranked negatives."""
    if data.group_examples is None:
        return []
    negatives = _negatives(data.groups)
    shown = data.group_examples.select(["example_id", "rendered", "target"]).to_pylist()
    cards = [
        Card(example["rendered"], example["target"], [], negatives[example["example_id"]])
        for example in shown
        if example["example_id"] in negatives
    ]
    return cards[:MAX_EXAMPLES]


def _negatives(groups: pa.Table | None) -> dict[str, list[Negative]]:
    """Each group's negatives in the order of their rank."""
    found = {}
    for group in groups.to_pylist() if groups is not None else []:
        negatives = [
            Negative(candidate["rank"], candidate["similarity"], candidate["strategy"], candidate["text"])
            for candidate in group["candidates"]
            if candidate["strategy"] != "target"
        ]
        found[group["example_id"]] = sorted(negatives, key=lambda negative: negative.rank or 0)
    return found
