"""Charts of the report, as SVG to stand inline in HTML: no file, no font and no address outside the page."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
}

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's, which the colour-blind can tell apart."""

SPARSE = 20
"""A curve of fewer points shows them."""

CURVES = {
    "loss": "loss",
    "won": "share of groups won",
    "margin": "reward margin",
    "target_logprob": "target log-prob (nats)",
    "held_out_loss": "held-out loss",
    "repetition": "repeated 4-grams, greedy",
}
"""Columns of a training's step metrics that are drawn, with their axis labels."""


@dataclass(frozen=True)
class Chart:
    """One picture."""

    title: str
    text: str
    """What it shows, in words, for who cannot see it."""
    svg: str


@dataclass(frozen=True)
class Bar:
    """A point with its interval."""

    label: str
    value: float
    low: float | None
    high: float | None


def win_rates(title: str, baseline: str, bars: Sequence[Bar]) -> Chart:
    """Win rates with intervals, against the line at one half."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.4 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        for row, bar in enumerate(bars):
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], color=COLORS[0], linewidth=2)
            axes.plot([bar.value], [row], "o", color=COLORS[0])
        axes.axvline(0.5, color="#333333", linestyle="--", linewidth=1)
        axes.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5), xlabel=f"win rate against {baseline}; a tie counts half")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        text = "; ".join(f"{bar.label} {_with_interval(bar)}" for bar in bars)
        return Chart(title, f"Win rates against {baseline}: {text}.", _svg(figure, title))


def training_curves(name: str, steps: pa.Table) -> Chart | None:
    """A training's step metrics, one panel each; None where it has none of those that are drawn."""
    series = _series(steps)
    if not series:
        return None
    with matplotlib.rc_context(STYLE):
        rows = (len(series) + 1) // 2
        figure = Figure(figsize=(WIDTH, 2.2 * rows), layout="constrained")
        panels = figure.subplots(rows, 2, squeeze=False).flat
        for panel, (column, (step, value)) in zip(panels, series.items(), strict=False):
            _draw_curve(panel, CURVES[column], step, value)
        if len(series) % 2:
            panels[len(series)].set_axis_off()
        title = f"Training of {name}"
        text = "; ".join(
            f"{CURVES[column]} from {value[0]:.3g} at step {step[0]:g} to {value[-1]:.3g} at step {step[-1]:g}"
            for column, (step, value) in series.items()
        )
        return Chart(title, f"{title}: {text}.", _svg(figure, title))


def similarity_histogram(cosines: Sequence[float]) -> Chart | None:
    """How near the negatives are to their targets; None without any."""
    values = np.asarray([cosine for cosine in cosines if cosine is not None], np.float64)
    if not len(values):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(values, bins=np.linspace(min(-0.2, float(values.min())), 1, 49).tolist(), color=COLORS[0])
        axes.set(xlabel="cosine to the target", ylabel="negatives")
        low, middle, high = np.percentile(values, [25, 50, 75])
        title = "Similarity of the negatives to their targets"
        text = f"{title}: {len(values)} negatives, median {middle:.2f}, half of them between {low:.2f} and {high:.2f}."
        return Chart(title, text, _svg(figure, title))


def _series(steps: pa.Table) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each known column that has a finite value."""
    found = {}
    for column in CURVES:
        if column in steps.column_names and "step" in steps.column_names:
            step = np.array(steps["step"].to_pylist(), np.float64)
            value = np.array(steps[column].to_pylist(), np.float64)
            finite = np.isfinite(value)
            if finite.any():
                found[column] = (step[finite], value[finite])
    return found


def _draw_curve(axes: Axes, label: str, step: np.ndarray, value: np.ndarray) -> None:
    axes.plot(step, value, color=COLORS[0], linewidth=1.2, marker="o" if len(step) < SPARSE else None)
    axes.set(xlabel="step", title=label)
    axes.title.set_fontsize(10)


def _with_interval(bar: Bar) -> str:
    return f"{bar.value:.2f}" + (f" ({bar.low:.2f} to {bar.high:.2f})" if bar.low is not None else "")


def _svg(figure: Figure, title: str) -> str:
    """The figure as an `svg` element that scales with the page and shares no id with another."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    )
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()
