"""A report as a browser sees it."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from cpo_pipe.eval.report.data import ReportData
from cpo_pipe.eval.report.report import write_report


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def render(tmp_path: Path, data: ReportData) -> tuple[str, Page]:
    """Write a report and return its HTML and its page."""
    write_report(tmp_path / "report.html", data)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def unpacked(html: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the data of the page's script: the names of columns and comparisons, and the examples."""
    packed = re.search(r'<script type="application/gzip"[^>]*>(.*?)</script>', html)
    assert packed is not None
    head, *examples = gzip.decompress(base64.b64decode(packed[1], validate=True)).decode().splitlines()
    return json.loads(head), [json.loads(line) for line in examples]


def row_of(page: Page, figure: str) -> str:
    """Return the text after a figure's name in its table row."""
    return page.text.split(f"\n{figure}")[1].split("\n")[0]
