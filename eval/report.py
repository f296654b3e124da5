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
from cpo_pipe.data.recipe import Published
from cpo_pipe.data.text import say, visible
from cpo_pipe.eval.charts import Bar, Chart, Point, alpha_curves, quality_charts, training_curves, win_rates
from cpo_pipe.eval.examples import pack
from cpo_pipe.eval.measure import ANY_DECODING, NOTICEABLE

DAGGER = " †"
SHARED_NOTE = (
    "† Measured with the same embedding model that ranked the negatives: what was trained on that ranking has an "
    "advantage here. Weigh it with the other figures."
)

MEANINGS = {
    "rep-4": "share of a text's 4-grams that repeat an earlier one, 0 to 1; nearer to the ground truth's is better",
    "loops": "share of the outputs that end in a phrase of two tokens or more, three times in a row; lower is better",
    **{
        f"distinct-{n}": f"different {n}-grams by all {n}-grams of all outputs together, 0 to 1; low: the outputs are "
        "all alike"
        for n in (1, 2, 3)
    },
    "self-BLEU": "mean BLEU of each of a prompt's samples against its others, 0 to 100; high: the samples are alike",
    "distinct-2 of samples": "different bigrams by all bigrams of a prompt's samples, 0 to 1; low: they are alike",
    "length": "tokens of an output, without the one that ends it",
    "chrF": "mean sentence chrF2 against the target, 0 to 100; higher is better",
    "target NLL": "negative log-likelihood of the targets' tokens, nats per token; lower is better",
    "target perplexity": "exponential of target NLL; lower is better",
    "MAUVE": "likeness of all outputs to all targets, 0 to 1, ± standard deviation over k-means seeds, on sentence "
    "embeddings or the hidden states of `mauve_model`; higher is better; differences within the spread are noise",
    "exact match": "share of the outputs whose answer equals the target's; higher is better",
    "cosine to target": "mean cosine of an output's embedding to its target's, −1 to 1; higher is better",
}
_JUDGED = {
    "win": "share of the examples that the judge gives to the system",
    "tie": "share that it gives to neither",
    "loss": "share that it gives to the baseline",
    "win rate": "wins and half of the ties, 0 to 1; above 0.5 is better than the baseline",
    "position bias": "share of the verdicts naming a winner that go to the output shown first; 0.5 is none",
    "flip rate": "share of the pairs whose verdict changes with the order in which the outputs are shown",
    "unparseable": "share of the answers that are no verdict; each counts as a tie",
    "match": "share of the outputs whose answer equals the target's; higher is better",
    "characters": "characters of an output",
    "log-prob": "log-prob of an output's tokens and of its end, nats per token; higher is likelier",
    "length-controlled win rate": "the win rate that a logistic model of outcome and length expects at equal "
    "length, after AlpacaEval 2.0; from 100 examples on, where neither system always writes more",
}

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
    "longer than the embedding model reads": ("{truncated:.1%}",),
    "tied in the order": ("{tied:.1%}",),
    "cosine, quantiles 10/50/90%": ("{similarity_p10:.2f}/{similarity_p50:.2f}/{similarity_p90:.2f}",),
    **{
        f"distinct-{n} (the targets')": (f"{{distinct_{n}:.2f}} ({{target_distinct_{n}:.2f}})", f"{{distinct_{n}:.2f}}")
        for n in (1, 2, 3)
    },
}

_NUMBER = re.compile(r"[0-9]+\.[0-9]+")
_REPORT_ONLY = re.compile(
    r"loops|distinct-\d.*|self-BLEU|length|target perplexity|cosine to target"
    r"|.* (tie|loss|position bias|flip rate|unparseable|characters|log-prob|against \S+)"
)
"""Metrics that the table on the terminal leaves to the report."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a stage of the run took."""

    name: str
    seconds: float
    """When it last ran, reuse of what was there included."""
    total_seconds: float
    """In all runs of this folder together."""
    spent: str
    """What its APIs were asked, and what that cost; empty where none was."""


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
    comparisons: pa.Table
    """COMPARISONS schema."""
    agreements: pa.Table
    """AGREEMENT schema."""
    shared_metrics: AbstractSet[str]
    notes: Sequence[str]
    examples: pa.Table
    """The evaluated examples, in order (EXAMPLES schema)."""
    outputs: pa.Table
    """`example_id`, `system`, `decoding`, `text`."""
    verdicts: pa.Table
    """How each output was judged (VERDICTS schema)."""
    published: Sequence[Published] = ()
    """Figures that others published."""
    ensembles: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)
    """α and system of each ensemble's members, by its name, by rising α."""
    stages: Sequence[StageRecord] = ()
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
class Differences:
    """Every two systems by one metric: a row per decoding and pair."""

    metric: str
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Beside:
    """Published figures beside those of the run: a row per system."""

    title: str
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
    """A training prompt with its negatives."""

    prompt: str
    target: str
    negatives: list[Negative]


def write_report(path: Path, data: ReportData) -> None:
    """Write the report as one HTML file, complete or absent."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.filters |= {"duration": _duration}
    folder = files("cpo_pipe.eval")
    source, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.html.j2", "report.js"))
    html = environment.from_string(source).render(
        data=data,
        grids=marked_grids(data),
        meanings=_meanings(data.metrics),
        shared_note=SHARED_NOTE if _shared_here(data.metrics, data.shared_metrics) else "",
        charts=[*_win_charts(data), *_alpha_charts(data)],
        differences=_differences(data),
        agreements=agreement_rows(data),
        published=published_tables(data),
        published_note=PUBLISHED_NOTE,
        noticeable=NOTICEABLE,
        training_charts=[chart for name, steps in data.trainings.items() if (chart := training_curves(name, steps))],
        quality=_quality(data.quality) if data.quality is not None else None,
        packed=pack(data.examples, data.outputs, data.verdicts),
        grouped=group_cards(data),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    atomic.write_bytes(path, html.encode())


def _visible(value: Any) -> Any:
    """Return what a place of the page shows: visible text; what is markup already, which is ours, stays as it is."""
    return visible(value) if type(value) is str else value


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.1f} s"


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
        say(note)


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
        say(note)


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
        if _REPORT_ONLY.fullmatch(metric):
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
    digits = 1 if row["metric"] in ("length", "chrF", "self-BLEU") else 3
    text = f"{row['value']:.{digits}f}"
    if spread is not None:
        text += f" ± {spread['value']:.{digits}f}"
    if row["ci_low"] is not None:
        text += f" [{row['ci_low']:.{digits}f}, {row['ci_high']:.{digits}f}]"
    return text


def marked_grids(data: ReportData) -> list[Grid]:
    """The figures by decoding, with marks at the baseline and at the metrics of the ranker's embedding model."""
    return [
        Grid(
            grid.decoding,
            [f"{system} (baseline)" if system == data.baseline else system for system in grid.systems],
            [(metric + (DAGGER if metric in data.shared_metrics else ""), cells) for metric, cells in grid.rows],
        )
        for grid in grids(data.metrics)
    ]


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
    """A chart per kind of win rate; members of ensembles have charts of their own."""
    members = {system for points in data.ensembles.values() for _, system in points}
    rates = [row for row in data.metrics.to_pylist() if " win rate" in row["metric"]]
    for metric in dict.fromkeys(row["metric"] for row in rates):
        panels: dict[str, list[Bar]] = {}
        for row in rates:
            if row["metric"] == metric and row["system"] not in members:
                bar = Bar(row["system"], row["value"], row["ci_low"], row["ci_high"])
                panels.setdefault(row["decoding"], []).append(bar)
        if panels:
            yield win_rates(_title(metric, data), metric.partition(" against ")[2] or data.baseline, panels)


def _alpha_charts(data: ReportData) -> Iterator[Chart]:
    """A chart per kind of win rate, and one of MAUVE, against the ensembles' α."""
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
            yield alpha_curves(f"{_title(metric, data)} of ensembles{spread}", curves)


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


def _title(metric: str, data: ReportData) -> str:
    return metric + (DAGGER if metric in data.shared_metrics else "")


def _differences(data: ReportData) -> list[Differences]:
    tables: dict[str, list[tuple[str, list[str]]]] = {}
    for row in data.comparisons.to_pylist():
        interval = "" if row["ci_low"] is None else f" [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        cells = [f"{row['difference']:+.3f}{interval}", _p(row["p"]), _p(row["p_holm"]), f"{row['n_needed']:,}"]
        head = f"{row['system_a']} against {row['system_b']}, {row['decoding']}"
        tables.setdefault(row["metric"], []).append((head, cells))
    return [
        Differences(metric + (DAGGER if metric in data.shared_metrics else ""), rows) for metric, rows in tables.items()
    ]


def agreement_rows(data: ReportData) -> list[tuple[str, list[str]]]:
    """Of every two judges, or a judge and the labels of people: who, then agreement, kappa and pairs."""
    rows = []
    for row in data.agreements.to_pylist():
        cells = [_share(row["agreement"], row["ci_low"], row["ci_high"]),
                 _share(row["kappa"], row["kappa_low"], row["kappa_high"]), f"{row['n']:,}"]  # fmt: skip
        rows.append((f"{row['judge_a']} and {row['judge_b']}", cells))
    return rows


PUBLISHED_NOTE = (
    "A run at another scale, with another model, other data or another judge compares by its order before it compares "
    "by its values."
)


def published_tables(data: ReportData) -> list[Beside]:
    """What others published, and what the run has of it."""
    found = {(row["metric"], row["decoding"], row["system"]): row for row in data.metrics.to_pylist()}
    tables = []
    for of in data.published:
        rows = []
        for system, value in of.values.items():
            row = found.get((of.metric, of.decoding, system), found.get((of.metric, ANY_DECODING, system)))
            rows.append((system, [f"{value:.3f}", _cell(row, None) if row else "–"]))
        tables.append(Beside(f"{of.source}: {of.metric}, {of.decoding}", rows))
    return tables


def unmeasured(data: ReportData) -> list[str]:
    """Published figures beside which the run has none, named."""
    return [
        f"{system} in {table.title}"
        for table in published_tables(data)
        for system, (_, own) in table.rows
        if own == "–"
    ]


def _share(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


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


def group_cards(data: ReportData) -> list[Card]:
    """Training prompts with their ranked negatives."""
    if data.group_examples is None:
        return []
    negatives = _negatives(data.groups)
    return [
        Card(example["rendered"], example["target"], negatives[example["example_id"]])
        for example in data.group_examples.select(["example_id", "rendered", "target"]).to_pylist()
        if example["example_id"] in negatives
    ]


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
