"""Bars on terminals of several widths, lines elsewhere, and the figures in both."""

import io
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from rich.console import Console

from cpo_pipe.data import progress
from cpo_pipe.data.progress import Step, track

NOTE = "loss 4.1711 accuracy 1.00 margin 2.57 target -328.7"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass."""
    now = time.monotonic()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    return sleep


def screen(width: int, monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(
        progress, "_display", progress._Display()
    )  # a command that ran here before may have hidden bars
    monkeypatch.setattr(console, "get_time", lambda: time.monotonic())
    return console


def last_line(console: Console) -> str:
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "\r", console.file.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()][-1]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (200, f"train cpo-ranked ━━━━━━━━━━━━━━━━━━━━ 20/20, 40 s {NOTE}"),
        (80, "train cpo-ranked ━━━━━━━━ 20/20, 40 s loss 4.1711 accuracy 1.00 margin 2.57 tar…"),
        (50, "train cpo-ranked ━━━━━━━━ 20/20, 40 s loss 4.1711…"),
    ],
)
def test_a_bar_is_one_line(
    width: int, shown: str, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    console = screen(width, monkeypatch)
    with track("train cpo-ranked", 20, "steps") as meter:
        clock(40)
        meter.advance(20, NOTE)
    assert last_line(console) == shown


def test_a_bar_in_progress_has_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    console = screen(80, monkeypatch)
    with suppress(KeyError), track("stage 6/7 train cpo-ranked", 2000, "steps") as meter:
        clock(10)
        meter.advance(5, NOTE)
        raise KeyError
    assert last_line(console).startswith("stage 6/7 train cpo-ranked ")
    assert "5/2,000, 0.5 steps/s, 1 h 6 min left" in last_line(console)
    assert len(last_line(console)) <= 80


def test_units_that_come_at_once_took_the_time_before_them(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    """A batch of samples is counted one by one when it is done; its rate is not that of counting."""
    console = screen(120, monkeypatch)
    with suppress(KeyError), track("outputs", 120, "samples") as meter:
        clock(30)
        for _ in range(60):
            meter.advance()
        raise KeyError
    assert "60/120, 2 samples/s, 30 s left" in last_line(console)


def test_what_was_done_earlier_counts_but_not_in_the_rate(clock: Callable[[float], None]) -> None:
    finished = []
    with (
        progress.stage("2/3", lambda step: None, lambda *work: finished.append(work)),
        track("train cpo", 100, "steps", done=40) as meter,
    ):
        clock(10)
        meter.advance(20)
        assert str(meter.step()) == "stage 2/3 train cpo: 60/100 steps, 2 steps/s, 20 s left"
        meter.advance(40)
    assert finished == [("train cpo", "steps", 60, 10.0)]


def test_a_line_in_the_log_is_not_misled_by_the_first_unit_of_a_batch(
    caplog: pytest.LogCaptureFixture, clock: Callable[[float], None]
) -> None:
    """It is written when the first of a batch is counted, in the time of all of them."""
    with caplog.at_level(logging.INFO, "cpo_pipe"), track("outputs", 300, "samples") as meter:
        for _ in range(3):
            clock(50)
            for _ in range(100):
                meter.advance()
    assert [record.getMessage() for record in caplog.records] == [
        "outputs: 1/300 samples",
        "outputs: 101/300 samples, 2 samples/s, 1 min 40 s left",
        "outputs: 201/300 samples, 2 samples/s, 50 s left",
    ]


def test_a_line_in_the_log_of_single_units(caplog: pytest.LogCaptureFixture, clock: Callable[[float], None]) -> None:
    with caplog.at_level(logging.INFO, "cpo_pipe"), track("train cpo", 4, "steps") as meter:
        for _ in range(3):
            clock(20)
            meter.advance(note="loss 1")
    assert [record.getMessage() for record in caplog.records][1:] == [
        "train cpo: 2/4 steps, 0.05 steps/s, 40 s left; loss 1",
        "train cpo: 3/4 steps, 0.05 steps/s, 20 s left; loss 1",
    ]


def test_a_step_is_one_line() -> None:
    step = Step("stage 3/8 rank", 412, 800, "groups", 22.0, "note")
    assert str(step) == "stage 3/8 rank: 412/800 groups, 22 groups/s, 18 s left; note"
    assert str(Step("train cpo", 3, 9000, "steps", 0.5)) == "train cpo: 3/9,000 steps, 0.5 steps/s, 4 h 59 min left"
    assert str(Step("prepare", 1, 20_000, "rows", 5230.4)) == "prepare: 1/20,000 rows, 5,230 rows/s, 4 s left"
    assert str(Step("judge", 0, 5, "pairs", 0.0)) == "judge: 0/5 pairs"
