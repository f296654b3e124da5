"""Progress of long work: a bar with rate and ETA on a terminal, a plain log line now and then elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

log = logging.getLogger(__name__)
console = Console(stderr=True)
LOG_SECONDS = 15.0


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "", style="progress.data.speed")


class Meter:
    """Counts finished units and shows them; made by `track`."""

    def __init__(self, label: str, total: int, bar: Progress | None, shown: bool = True):
        self._shown = shown
        self.label, self.total, self.done = label, total, 0
        self._bar = bar
        self._task = bar.add_task(label, total=total, note="") if bar else None
        self._start = self._logged = time.monotonic()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done; `note` is shown beside them."""
        self.done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, note=note)
        elif self._shown and time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            rate = max(self.done, 1e-9) / (self._logged - self._start)  # nothing may be done yet
            log.info("%s: %d/%d, %.3g/s, %.0f s left %s", self.label, self.done, self.total, rate,
                     (self.total - self.done) / rate, note)  # fmt: skip


@contextmanager
def track(label: str, total: int, *, shown: bool = True) -> Iterator[Meter]:
    """Show the progress of `total` units of work; of several processes, one should."""
    if not console.is_terminal or not shown:
        yield Meter(label, total, None, shown)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn()]
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bar:
        yield Meter(label, total, bar)
