"""The report with 5,000 examples and the outputs of 4 systems: its size, and how long a browser takes to open it."""

import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.sources.python_docs import collect
from cpo_pipe.eval.judging import VERDICTS
from cpo_pipe.eval.report.report import write_report
from tests.support.report_data import example, make_data, said, verdict

EXAMPLE_COUNT, RUNS = 5_000, 5
SYSTEMS = ("mle", "cpo", "cpo-ranked", "dpo")
PROMPT_WORDS, OUTPUT_WORDS = 60, 120


def bench_report(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    draw = random.Random(0)
    words = " ".join(collect()).split(" ")

    def text(count: int) -> str:
        start = draw.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    examples = [
        {**example(number), "rendered": text(PROMPT_WORDS), "target": text(OUTPUT_WORDS), "category": "qa"}
        for number in range(EXAMPLE_COUNT)
    ]
    outputs = [
        {"example_id": f"e{number}", "system": system, "decoding": "greedy", "text": text(OUTPUT_WORDS)}
        for number in range(EXAMPLE_COUNT)
        for system in SYSTEMS
    ]
    verdicts = [
        verdict(number, "a", said("ab", "a", f'{{"a": {draw.random()}, "b": {draw.random()}}}'), system=system)
        for number in range(EXAMPLE_COUNT)
        for system in SYSTEMS[1:]
    ]
    data = make_data(
        examples=pa.Table.from_pylist(examples, schema=EXAMPLES),
        outputs=pa.Table.from_pylist(outputs),
        verdicts=pa.Table.from_pylist(verdicts, schema=VERDICTS),
    )
    path = tmp_path / "report.html"
    start = time.perf_counter()
    write_report(path, data)
    drawn = time.perf_counter() - start
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened, searched = zip(*(_seconds(browser.new_page(), path) for _ in range(RUNS)), strict=True)
        browser.close()
    size = path.stat().st_size / 1e6
    written = [row[name] for row in examples for name in ("rendered", "target")] + [row["text"] for row in outputs]
    print(f"{EXAMPLE_COUNT:,} examples, {len(SYSTEMS)} systems, {sum(map(len, written)) / 1e6:.1f} M characters:")
    print(
        f"{size:.1f} MB, drawn in {drawn:.1f} s, opened in {statistics.median(opened):.2f} s (worst {max(opened):.2f})"
    )
    print(f"first search {statistics.median(searched):.2f} s")
    assert size < 15
    assert statistics.median(opened) < 3


def _seconds(page: Any, path: Path) -> tuple[float, float]:
    """Until the first examples are shown, and from the last key of a search until its matches are."""
    start = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("#cards article")
    opened = time.perf_counter() - start
    start = time.perf_counter()
    page.fill("input[type=search]", "nowhere to be found")
    page.wait_for_selector("#cards:empty", state="attached")
    searched = time.perf_counter() - start
    page.close()
    return opened, searched
