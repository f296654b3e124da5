"""Charts of the report, as inline SVG: no file, font or address outside the page."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cpo_pipe.data.text import visible
from cpo_pipe.eval.report.verdict import percent

WIDTH = 7.0
"""Inches; the page scales it."""

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, selected and found
    "svg.hashsalt": "cpo-pipe",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.facecolor": "none",  # the page's background, light or dark
    "figure.facecolor": "none",
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
}

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's palette, safe for colour-blind readers."""

_PAGE = {"#000000": "text", "#333333": "text", "#dddddd": "line"}
PAGE_COLORS = {color: f"var(--{name}, {color})" for color, name in _PAGE.items()}
"""Colours of the page that take the place of those of a figure, which are black on white, and stay elsewhere."""

MARKERS, LINES = "os^Dv", ("-", "--", ":", "-.")
"""Distinguish several curves without colour."""

SPARSE = 20
"""A curve with fewer points has markers."""

CURVES = {
    "loss": "loss",
    "reward_accuracy": "reward accuracy (share of groups)",
    "reward_margin": "reward margin",
    "target_logprob": "target log-prob (nats)",
    "validation_loss": "validation loss",
    "repetition": "repeated 4-grams, greedy",
}
"""Columns of a training's step metrics that are drawn, with their axis labels."""


@dataclass(frozen=True)
class Chart:
    """One picture."""

    title: str
    text: str
    """A description for readers who cannot see it."""
    svg: str


@dataclass(frozen=True)
class Bar:
    """A point with its interval."""

    label: str
    value: float
    low: float | None
    high: float | None


Point = tuple[float, float, float | None, float | None]
"""α, the value, and its interval."""


def win_rates(title: str, opponent: str, panels: Mapping[str, Sequence[Bar]]) -> Chart:
    """Draw win rates with intervals against a line at one half, a panel per decoding (Feng et al. 2025, figure 1)."""
    with matplotlib.rc_context(STYLE):
        heights = [len(bars) for bars in panels.values()]
        size = (WIDTH, 0.9 + 0.4 * sum(heights) + 0.3 * (len(panels) - 1))
        figure = Figure(figsize=size, layout="constrained")
        all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights).flat
        for axes, (decoding, bars) in zip(all_axes, panels.items(), strict=True):
            for row, bar in enumerate(bars):
                if bar.low is not None and bar.high is not None:
                    axes.plot([bar.low, bar.high], [row, row], color=COLORS[0], linewidth=2)
                axes.plot([bar.value], [row], "o", color=COLORS[0])
            axes.axvline(0.5, color="#333333", linestyle="--", linewidth=1)
            axes.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5))
            axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
            axes.set_title(decoding, loc="left", fontsize=10, parse_math=False)
        axes.set_xlabel(f"win rate against {opponent}; a tie counts half", parse_math=False)
        text = "; ".join(
            f"{bar.label}, {decoding} {_with_interval(bar)}" for decoding, bars in panels.items() for bar in bars
        )
        return Chart(title, f"Win rates against {opponent}: {text}.", _svg(figure, title))


def alpha_curves(title: str, curves: Sequence[tuple[str, Sequence[Point]]]) -> Chart:
    """Draw a metric of weight-space ensembles against their α, a curve each (Feng et al. 2025, figure 2).

    Args:
        title: of the figure.
        curves: label and points of each, by rising α.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, points) in enumerate(curves):
            alpha, value, low, high = zip(*points, strict=True)
            color, marker, line = (each[number % len(each)] for each in (COLORS, MARKERS, LINES))
            axes.plot(alpha, value, color=color, marker=marker, linestyle=line, label=label)
            for at, below, above in zip(alpha, low, high, strict=True):
                if below is not None and above is not None:
                    axes.plot([at, at], [below, above], color=color, linewidth=1)
        axes.set_xlabel("α, weight of the first model")
        for entry in axes.legend(frameon=False).get_texts():
            entry.set_parse_math(False)
        text = "; ".join(f"{label}: {', '.join(map(_at_alpha, points))}" for label, points in curves)
        return Chart(title, f"{title} against α. {text}.", _svg(figure, title))


def _at_alpha(point: Point) -> str:
    alpha, value, low, high = point
    return f"{_with_interval(Bar('', value, low, high))} at {alpha:g}"


def training_curves(trainings: Mapping[str, pa.Table]) -> Chart | None:
    """Draw the step metrics of all trainings, one panel for each of CURVES; None without any."""
    series = {name: found for name, steps in trainings.items() if (found := _series(steps))}
    drawn = [column for column in CURVES if any(column in found for found in series.values())]
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        rows = (len(drawn) + 1) // 2
        figure = Figure(figsize=(2 * WIDTH, 2.6 * rows + 0.5), layout="constrained")
        panels = list(figure.subplots(rows, 2, squeeze=False).flat)
        for panel, column in zip(panels, drawn, strict=False):
            for number, (name, found) in enumerate(series.items()):
                if column in found:
                    _draw_curve(panel, name, number, *found[column])
            panel.set(xlabel="step", title=CURVES[column])
            panel.title.set_fontsize(10)
        for panel in panels[len(drawn) :]:
            panel.set_axis_off()
        lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
        legend = figure.legend([*lines.values()], [*map(str, lines)], loc="outside upper left", ncols=6, frameon=False)
        for entry in legend.get_texts():
            entry.set_parse_math(False)
        text = "; ".join(
            f"{name}: {CURVES[column]} from {value[0]:.3g} at step {step[0]:g} to {value[-1]:.3g} at step {step[-1]:g}"
            for name, found in series.items()
            for column, (step, value) in found.items()
        )
        title = "All trainings"
        return Chart(title, f"{title}. {text}.", _svg(figure, title))


def quality_charts(quality: pa.Table) -> list[Chart]:
    """Return the histograms of the quality table of the negatives that were measured."""
    *strategies, together, _ = ({**row, "strategy": visible(row["strategy"])} for row in quality.to_pylist())
    similarity = _histograms("Scores of the negatives in the ranking", "score (of embeddings: cosine)", strategies,
                             "similarity_histogram", "similarity_p50")  # fmt: skip
    length = _histograms("Length of the negatives relative to their targets", "tokens, as a multiple of the target's",
                         strategies, "length_ratio_histogram", "length_ratio", octaves=True)  # fmt: skip
    return [chart for chart in (similarity, length, _group_sizes(together["group_sizes"])) if chart is not None]


def _histograms(
    title: str, axis: str, rows: Sequence[Mapping[str, Any]], histogram: str, median: str, octaves: bool = False
) -> Chart | None:
    """Draw a panel per strategy on a common axis, so that no colour is needed."""
    drawn = [row for row in rows if row[histogram]]
    if not drawn:
        return None
    filled = [one for row in drawn for one in row[histogram] if one["count"]]
    low, high = min(one["low"] for one in filled), max(one["high"] for one in filled)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.9 * len(drawn)), layout="constrained")
        panels = list(figure.subplots(len(drawn), 1, squeeze=False, sharex=True, sharey=True).flat)
        for panel, row in zip(panels, drawn, strict=True):
            shares = np.array([one["count"] for one in row[histogram]]) / row["kept"]
            edges = [row[histogram][0]["low"], *(one["high"] for one in row[histogram])]
            panel.stairs(shares, edges, fill=True, color=COLORS[0])
            panel.axvline(row[median], color="#333333", linewidth=1.5)
            panel.set_title(row["strategy"], loc="left", fontsize=10, parse_math=False)
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if octaves:
            panels[-1].set_xscale("log", base=2)
            panels[-1].xaxis.set_major_formatter(lambda value, _: str(Fraction(value).limit_denominator(64)))
        panels[-1].set(xlim=(low, high), xlabel=f"{axis}; the line is the median")
        medians = "; ".join(f"{row['strategy']} {row['kept']} negatives, median {row[median]:.2f}" for row in drawn)
        return Chart(title, f"{title}: {medians}. Shares of the strategy's negatives.", _svg(figure, title))


def _group_sizes(counts: Sequence[int] | None) -> Chart | None:
    """Draw the number of candidates of the groups; `counts` by the number of negatives, from 0."""
    if not counts:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
        axes = figure.add_subplot()
        sizes = np.arange(1, len(counts) + 1)
        axes.bar(sizes, counts, color=[COLORS[1], *[COLORS[0]] * (len(counts) - 1)])
        axes.set(xlabel="K, candidates of a group after dropping", ylabel="groups", xlim=(0.4, len(counts) + 0.6))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        title = "Candidates of a group"
        mean = float(sizes @ np.array(counts)) / sum(counts)
        alone = f"{counts[0]} of them have no negative (K = 1)" if counts[0] else "all of them have a negative"
        return Chart(title, f"{title}: {sum(counts)} groups, K {mean:.2f} on average; {alone}.", _svg(figure, title))


def _series(steps: pa.Table) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Return steps and values of each known column with a finite value."""
    found = {}
    for column in CURVES:
        if column in steps.column_names and "step" in steps.column_names:
            step = np.array(steps["step"].to_pylist(), np.float64)
            value = np.array(steps[column].to_pylist(), np.float64)
            finite = np.isfinite(value)
            if finite.any():
                found[column] = (step[finite], value[finite])
    return found


def _draw_curve(axes: Axes, name: str, number: int, step: np.ndarray, value: np.ndarray) -> None:
    color, marker, line = (each[number % len(each)] for each in (COLORS, MARKERS, LINES))
    shown = marker if len(step) < SPARSE else None
    axes.plot(step, value, color=color, linewidth=1.2, linestyle=line, marker=shown, label=name)


def _with_interval(bar: Bar) -> str:
    interval = "" if bar.low is None or bar.high is None else f" ({_rounded(bar.low)} to {_rounded(bar.high)})"
    return _rounded(bar.value) + interval


def _rounded(value: float) -> str:
    return f"{percent(value) / 100:.2f}"  # halves up, as in the tables


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an `svg` element that scales with the page and shares no id with another."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    )
    for color, variable in PAGE_COLORS.items():
        svg = svg.replace(color, variable)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()
