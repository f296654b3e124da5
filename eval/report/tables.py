"""The tables of a report, as text cells; the page, the terminal and the Markdown export show the same."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cpo_pipe.data.text import visible
from cpo_pipe.eval.metrics.figures import ANY_DECODING
from cpo_pipe.eval.metrics.mauve import MAUVE_METRICS
from cpo_pipe.eval.metrics.text import TEXT_METRICS
from cpo_pipe.eval.metrics.wins import JUDGED
from cpo_pipe.eval.report.data import ReportData
from cpo_pipe.eval.report.leaderboard import DAGGER

SHARED_NOTE = (
    "† Measured with the embedding model that ranked the negatives: systems trained on that ranking have an advantage "
    "in this metric. Compare it with the other metrics."
)
PUBLISHED_NOTE = (
    "If the scale, model, data or judge differs from the publication's, compare the order of the systems, not their "
    "values."
)

Row = tuple[str, list[str]]
"""The head of a row, and its cells."""

# The quality of the negatives: the first format whose columns all have a value.
QUALITY_FORMATS = {
    "made": ("{made:,}",),
    "copies of the target": ("{copies:.1%}",),
    "duplicates": ("{duplicates:.1%}",),
    "dropped as correct": ("{correct:.1%}",),
    "without an end token": ("{unended:.1%}",),
    "kept": ("{kept:,}",),
    "groups without negatives": ("{alone:.1%}",),
    "tokens, mean": ("{tokens:.1f}",),
    "length / target length, median": ("{length_ratio:.2f}",),
    "target is longer": ("{longer:.0%}",),
    "target is longest (chance)": ("{longest:.0%} ({chance:.0%})",),
    "target has higher log-prob": ("{likelier:.0%}",),
    "target has highest log-prob (chance)": ("{likeliest:.0%} ({chance:.0%})",),
    "target has higher log-prob per token": ("{likelier_per_token:.0%}",),
    "target has highest log-prob per token (chance)": ("{likeliest_per_token:.0%} ({chance:.0%})",),
    "reference log-prob, nats per token": ("{reference_logprob:.2f}",),
    "sampler log-prob, nats per token": ("{sampler_logprob:.2f}",),
    "score in the ranking, mean": ("{similarity:.2f}",),
    "truncated by the ranking model": ("{truncated:.1%}",),
    "tied in the ranking": ("{tied:.1%}",),
    "score, quantiles 10/50/90%": ("{similarity_p10:.2f}/{similarity_p50:.2f}/{similarity_p90:.2f}",),
    **{
        f"distinct-{n} (the targets')": (f"{{distinct_{n}:.2f}} ({{target_distinct_{n}:.2f}})", f"{{distinct_{n}:.2f}}")
        for n in (1, 2, 3)
    },
}


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text; the rows have heads."""

    title: str
    columns: Sequence[str]
    """Without the column of the heads."""
    rows: list[Row]


def grids(data: ReportData) -> list[TextTable]:
    """Return the metrics, a table per decoding with a column per system; those that have no decoding are in each.

    The baseline and the metrics of the ranker's embedding model are marked.
    """
    rows = data.metrics.to_pylist()
    systems = list(dict.fromkeys(row["system"] for row in rows))
    names = [name for name in dict.fromkeys(row["metric"] for row in rows) if name != "MAUVE sd"]
    decodings = [name for name in dict.fromkeys(row["decoding"] for row in rows) if name != ANY_DECODING]
    found = {(row["system"], row["decoding"], row["metric"]): row for row in rows}
    columns = [f"{system} (baseline)" if system == data.baseline else system for system in systems]

    def cell(system: str, decoding: str, metric: str) -> str:
        row = found.get((system, decoding, metric)) or found.get((system, ANY_DECODING, metric))
        spread = found.get((system, decoding, "MAUVE sd")) if metric == "MAUVE" else None
        return _cell(row, spread) if row else "–"

    return [
        TextTable(
            f"Decoding: {decoding}",
            columns,
            [(marked(metric, data), [cell(system, decoding, metric) for system in systems]) for metric in names],
        )
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


def marked(metric: str, data: ReportData) -> str:
    """Return a metric's name, with a dagger if it uses the ranker's embedding model."""
    return metric + (DAGGER if metric in data.shared_metrics else "")


def descriptions(data: ReportData) -> dict[str, str]:
    """Return what each metric of the report means."""
    known = {**TEXT_METRICS, **MAUVE_METRICS, **{metric.name: metric.description for metric in data.score_metrics}}
    found = {}
    for name in dict.fromkeys(data.metrics["metric"].to_pylist()):
        judge, _, figure = name.partition(" ")
        if name in known:
            found[name] = known[name]
        elif figure in JUDGED:
            found[name] = f"{JUDGED[figure]} (judge {judge})"
    return found


def difference_tables(data: ReportData) -> list[TextTable]:
    """Return the differences between every two systems, a table per metric."""
    columns = ("difference", "p", "p adjusted", "prompts needed")
    tables: dict[str, list[Row]] = {}
    for row in data.comparisons.to_pylist():
        interval = "" if row["ci_low"] is None else f" [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        cells = [f"{row['difference']:+.3f}{interval}", _p(row["p"]), _p(row["p_holm"]), _count(row["n_needed"])]
        head = f"{row['system_a']} against {row['system_b']}, {row['decoding']}"
        tables.setdefault(row["metric"], []).append((head, cells))
    return [TextTable(f"Differences in {marked(metric, data)}", columns, rows) for metric, rows in tables.items()]


def agreement_table(data: ReportData) -> TextTable:
    """Return the agreement of every two judges, or of a judge and the human annotations; without rows if none."""
    rows = []
    for row in data.agreements.to_pylist():
        decided = "–" if row["decided"] is None else f"{row['decided']:.3f} ({row['n_decided']:,})"
        cells = [_share(row["agreement"], row["ci_low"], row["ci_high"]), decided,
                 f"{row['ties_a']:.1%}, {row['ties_b']:.1%}",
                 _share(row["kappa"], row["kappa_low"], row["kappa_high"]), f"{row['n']:,}"]  # fmt: skip
        rows.append((f"{row['judge_a']} and {row['judge_b']}", cells))
    return TextTable("Agreement of judges", ("agreement", "of decided pairs", "ties", "kappa", "pairs"), rows)


def published_tables(data: ReportData) -> list[TextTable]:
    """Return the published results beside the run's own: a row per system."""
    found = {(row["metric"], row["decoding"], row["system"]): row for row in data.metrics.to_pylist()}
    tables = []
    for published in data.published:
        rows = []
        for system, value in published.values.items():
            metric, decoding = published.metric, published.decoding
            row = found.get((metric, decoding, system), found.get((metric, ANY_DECODING, system)))
            rows.append((system, [f"{value:.3f}", _cell(row, None) if row else "–"]))
        title = f"{published.source}: {published.metric}, {published.decoding}"
        tables.append(TextTable(title, ("published", "this run"), rows))
    return tables


def unmeasured(data: ReportData) -> list[str]:
    """Return the published results that the run does not measure."""
    return [
        f"{system} in {table.title}"
        for table in published_tables(data)
        for system, (_, own) in table.rows
        if own == "–"
    ]


def quality_table(table: pa.Table) -> tuple[TextTable, dict[str, str]]:
    """Return the quality of the negatives, a column per strategy, and what its measures mean.

    Only measures that have values are shown; all strategies together have a column if there are several.
    """
    *strategies, together, target = ({**row, "strategy": visible(row["strategy"])} for row in table.to_pylist())
    columns = [*strategies, *([together] if len(strategies) > 1 else []), {**target, "strategy": "targets"}]
    rows = [(name, [_first_format(formats, row) for row in columns]) for name, formats in QUALITY_FORMATS.items()]
    rows = [(name, cells) for name, cells in rows if set(cells) != {"–"}]
    docs = {name: (table.schema.field(name).metadata or {}).get(b"doc", b"").decode() for name in table.column_names}
    meanings = {name: "; ".join(docs[column] for column in _columns(QUALITY_FORMATS[name][0])) for name, _ in rows}
    return TextTable("Quality of the negatives", [row["strategy"] for row in columns], rows), meanings


def leakage_table(figures: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the overlap of held-out with training examples (rows of LEAKAGE), a row per split and part."""
    columns = ("examples", "equal", "near-duplicates", "n words in a row", "n", "fewer than n words")
    rows = [
        (
            f"{row['split']} {row['part']}s",
            [
                f"{row['examples']:,}",
                *(
                    f"{row[kind]:,} ({row[kind] / row['examples']:.1%})"
                    for kind in ("equal", "near_duplicates", "ngrams")
                ),
                str(row["n"]),
                f"{row['short']:,}",
            ],
        )
        for row in figures
    ]
    return TextTable("Overlap with training examples", columns, rows)


def _first_format(formats: Sequence[str], row: Mapping[str, Any]) -> str:
    usable = (each for each in formats if all(row[column] is not None for column in _columns(each)))
    return next((each.format(**row) for each in usable), "–")


def _columns(text: str) -> list[str]:
    return re.findall(r"{(\w+)", text)


def _share(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
