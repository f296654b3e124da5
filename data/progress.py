"""Progress of long work: a bar with rate and time left on a terminal, a log line now and then elsewhere.

What is in progress can also be observed, so that another command can tell (`cpo-pipe status`).
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

log = logging.getLogger(__name__)
console = Console(stderr=True)
LOG_SECONDS = 15.0
WIDE = 100
"""Columns of a terminal that has room for a long bar."""
BURST_SECONDS = 0.05
"""Units that follow each other faster were made together."""
OBSERVED_SECONDS = 2.0
"""How often an observer is told at most."""


@dataclass(frozen=True)
class Step:
    """How far some work is."""

    label: str
    done: int
    total: int
    unit: str
    """What is counted, such as `groups`."""
    rate: float
    """Units per second so far; 0 as long as it is not known."""
    note: str = ""

    @property
    def seconds_left(self) -> float | None:
        """The time left at this rate; None as long as the rate is not known."""
        return (self.total - self.done) / self.rate if self.rate else None

    @property
    def speed(self) -> str:
        """The rate and the time left, as text; empty as long as they are not known."""
        if self.seconds_left is None:
            return ""
        rate = f"{self.rate:,.0f}" if self.rate >= 100 else f"{self.rate:.3g}"
        return f"{rate} {self.unit}/s, {duration_text(self.seconds_left)} left"

    def __str__(self) -> str:
        """Return it as one line."""
        parts = [f"{self.label}: {self.done:,}/{self.total:,} {self.unit}", self.speed]
        return ", ".join(filter(None, parts)) + (f"; {self.note}" if self.note else "")


@dataclass
class _Display:
    """How progress is shown, and to whom."""

    bars: bool = True
    """Whether a terminal gets bars."""
    observe: Callable[[Step], None] | None = None
    finish: Callable[[str, str, int, float], None] | None = None
    """Takes label, unit, number and seconds of finished work."""
    stage: str = ""
    """What precedes all labels: `stage 3/8 `."""


_display = _Display()


def show_bars(shown: bool) -> None:
    """Decide whether a terminal gets bars (the default) or log lines."""
    _display.bars = shown


@contextmanager
def hidden() -> Iterator[None]:
    """Show no bars in a block."""
    before, _display.bars = _display.bars, False
    try:
        yield
    finally:
        _display.bars = before


@contextmanager
def stage(
    number: str, observe: Callable[[Step], None], finish: Callable[[str, str, int, float], None]
) -> Iterator[None]:
    """Put a stage's number before all labels, and tell of progress and of finished work in it.

    Args:
        number: such as `3/8`; empty: none.
        observe: takes how far some work is, now and then.
        finish: takes label, unit, number of units and seconds of work that was done to its end.
    """
    before = _display.stage, _display.observe, _display.finish
    _display.stage, _display.observe, _display.finish = f"stage {number} " if number else "", observe, finish
    try:
        yield
    finally:
        _display.stage, _display.observe, _display.finish = before


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Figures(ProgressColumn):
    """Units done, rate and time left; at the end the time that it took."""

    def render(self, task: Task) -> Text:
        step: Step = task.fields["meter"].step()
        speed = f"{duration_text(task.finished_time or 0)}" if task.finished else step.speed
        return Text(f"{step.done:,}/{step.total:,}{', ' if speed else ''}{speed}", style="progress.remaining")


class Meter:
    """Counts finished units and shows them; made by `track`."""

    def __init__(
        self, label: str, total: int, unit: str = "", bar: Progress | None = None, shown: bool = True, done: int = 0
    ):
        self._shown = shown
        self.label, self.total, self.unit, self.done = f"{_display.stage}{label}", total, unit, done
        self._before = done
        self._start = self._logged = self._observed = self._advanced = time.monotonic()
        self._rate = 0.0
        """Before the units that come at once now: a batch of them is announced with its first, which says nothing of
        the others."""
        self._bar = bar
        self._task = bar.add_task(self.label, total=total, completed=done, note="", meter=self) if bar else None

    @property
    def new(self) -> int:
        """The units done since the meter began."""
        return self.done - self._before

    def step(self, note: str = "") -> Step:
        """Return how far the work is."""
        rate = self.new / max(time.monotonic() - self._start, 1e-9)
        return Step(self.label, self.done, self.total, self.unit, rate, note)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done; `note` is shown beside them."""
        now = time.monotonic()
        if now - self._advanced > BURST_SECONDS:
            self._rate = self.new / (self._advanced - self._start) if self.new else 0.0
        self._advanced = now
        self.done += units
        step = Step(self.label, self.done, self.total, self.unit, self._rate, note)
        if _display.observe is not None and self._shown and now - self._observed >= OBSERVED_SECONDS:
            self._observed = now
            _display.observe(step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, note=note)
        elif self._shown and now - self._logged >= LOG_SECONDS:
            self._logged = now
            log.info("%s", step, extra={"progress": asdict(step) | {"seconds_left": step.seconds_left}})


@contextmanager
def track(label: str, total: int, unit: str = "rows", *, done: int = 0, shown: bool = True) -> Iterator[Meter]:
    """Show the progress of `total` units of work, `done` of them earlier; of several processes, one should."""
    start = time.monotonic()
    columns = [
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20 if console.width >= WIDE else 8),
        _Figures(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),  # cut where there is no room
    ]
    with_bar = console.is_terminal and _display.bars and shown
    bar = Progress(*columns, console=console, expand=True) if with_bar else None
    with bar or nullcontext():
        meter = Meter(label, total, unit, bar, shown, done)
        yield meter
    if _display.finish is not None:
        _display.finish(label, unit, meter.new, time.monotonic() - start)
