"""Command `compare`: which keys of runs differ, which artifacts and metrics do as a result, and how significantly."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from cpo_pipe.data.store import atomic
from cpo_pipe.data.store.differences import ABSENT
from cpo_pipe.data.text import abridged, one_line, say, say_prose
from cpo_pipe.eval.statistics.paired import Difference, Key, paired_differences
from cpo_pipe.runs import RunFolder
from cpo_pipe.screen import print_table

NOT_SET = "not set"
NONE = "–"
MOST_ROWS = 12
"""Metrics that the terminal shows where none differs significantly."""


@dataclass(frozen=True)
class MetricRow:
    """A metric that the runs share."""

    system: str
    decoding: str
    metric: str
    values: list[float | None]
    """By run."""
    differences: list[Difference | None]
    """To the first run, of each later one."""

    @property
    def significant(self) -> bool:
        """Whether a difference is."""
        return any(difference is not None and difference.significant for difference in self.differences)


@dataclass(frozen=True)
class RunComparison:
    """Where runs differ; all lists are by run."""

    runs: list[str]
    keys: list[tuple[str, list[str]]]
    artifacts: list[tuple[str, list[str]]]
    """By stage; only those that differ."""
    metrics: list[MetricRow]
    notes: list[str]


def compare(runs: Sequence[RunFolder]) -> RunComparison:
    """Compare runs with the first of them."""
    first, *others = runs
    recipes = [dict(_leaves(run.recipe)) for run in runs]
    paths = dict.fromkeys(path for one in recipes for path in one if path != "name")
    values = {path: [_shown(one.get(path, ABSENT)) for one in recipes] for path in paths}
    keys = {path: shown for path, shown in values.items() if len({*shown}) > 1}
    made = [run.artifacts() for run in runs]
    stages = dict.fromkeys(stage for one in made for stage in one)
    artifacts = [(stage, [one.get(stage, NONE) for one in made]) for stage in stages]
    notes: list[str] = []
    found = [_differences(first, other, notes) for other in others]
    figures = [run.metrics() for run in runs]
    shared = [key for key in figures[0] if any(key in other for other in figures[1:])]
    rows = [
        MetricRow(*key, [one.get(key) for one in figures], [one.get(key) for one in found])
        for key in shared
        if not all(_same(one.get(key), figures[0][key]) for one in figures[1:])
    ]
    return RunComparison(
        [run.label for run in runs],
        [*keys.items()],
        [(stage, names) for stage, names in artifacts if len({*names}) > 1],
        rows,
        list(dict.fromkeys(notes)),
    )


def _differences(first: RunFolder, other: RunFolder, notes: list[str]) -> Mapping[Key, Difference]:
    metrics, others = first.metrics(), other.metrics()
    for run, figures in ((first, metrics), (other, others)):
        if not figures:
            notes.append(f"{run.label}: has no metrics; run `cpo-pipe evaluate` with its recipe")
    one, two = first.values(), other.values()
    for run, values in ((first, one), (other, two)):
        if values is None and run.metrics():
            notes.append(f"{run.label}: its store no longer has the values per example, so nothing is tested")
    baselines = {str((run.recipe.get("evaluate") or {}).get("baseline")) for run in (first, other)}
    if len(baselines) > 1:
        notes.append(f"win rates are against different baselines ({', '.join(sorted(baselines))})")
    if one is None or two is None:
        return {key: Difference(others[key] - metrics[key]) for key in metrics.keys() & others.keys()}
    return paired_differences(metrics, others, one, two)


def _same(one: float | None, other: float) -> bool:
    """Return whether two figures differ by no more than the rounding of another batch."""
    return one is not None and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a recipe that hold no section, with their values."""
    if isinstance(value, dict) and (value or not path):
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _shown(value: Any) -> str:
    return NOT_SET if value is ABSENT else abridged(str(value), 60)


def print_comparison(found: RunComparison) -> None:
    """Print what differs: keys, artifacts, and the metrics that differ significantly; of the others the number."""
    names = [f"run {number}" for number in range(1, len(found.runs) + 1)]
    for name, label in zip(names, found.runs, strict=True):
        say(one_line(f"{name}: {label}"))
    blocks = {"keys that differ": found.keys, "artifacts that differ": found.artifacts}
    for title, block in blocks.items():
        say()
        say(f"{title}:" if block else f"{title}: none")
        print_table(["", *names], [[name, *cells] for name, cells in block], prose=False)
    say()
    shown = [row for row in found.metrics if row.significant] or found.metrics[:MOST_ROWS]
    hidden = len(found.metrics) - len(shown)
    decided = bool(shown) and shown[0].significant
    say(f"metrics that differ{':' if decided else ', none of them significantly:' if shown else ': none'}")
    rows = [
        [
            f"{row.system}, {row.decoding}: {row.metric}",
            *map(value_text, row.values),
            *map(gain_text, row.differences),
        ]
        for row in shown
    ]
    gains = [f">{name} − {names[0]}" for name in names[1:]]
    print_table(["", *(f">{name}" for name in names), *gains], rows, prose=False)
    if any(row.significant for row in shown):
        say_prose("* p < 0.05, paired by prompt, adjusted (Holm) for all metrics")
    if hidden:
        say_prose(f"{hidden} more differ, not significantly; --html shows all")
    for note in found.notes:
        say_prose(one_line(note))


def value_text(value: float | None) -> str:
    """Return a metric's value as tables show it."""
    return NONE if value is None else f"{value:.4g}"


def gain_text(difference: Difference | None) -> str:
    """Return a difference with its interval, and a star if it is significant."""
    if difference is None:
        return NONE
    interval = f" [{difference.low:+.2g}, {difference.high:+.2g}]" if difference.low is not None else ""
    return f"{difference.value:+.3g}{interval}{'*' if difference.significant else ''}"


def write_page(path: Path, found: RunComparison) -> None:
    """Write the comparison as one HTML file that needs nothing but itself."""
    folder = files("cpo_pipe.eval.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(folder.joinpath("compare.html.j2").read_text(encoding="utf-8"))
    html = template.render(
        found=found, style=folder.joinpath("report.css").read_text(encoding="utf-8"), value=value_text, gain=gain_text
    )
    atomic.write_bytes(path, html.encode())
