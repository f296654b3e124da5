"""docs/results.md: two commands write a part of it each."""

import re
from pathlib import Path

PARTS = ("real model", "tiny model")
"""In the order in which the page shows them."""


def write_part(page: Path, part: str, text: str) -> None:
    """Write a part of the page, and leave the other as it is."""
    written = page.read_text() if page.exists() else ""
    parts = dict(re.findall(r"<!-- part: (.+?) -->\n(.*?)\n*(?=<!-- part: |\Z)", written, re.DOTALL))
    parts[part] = text.strip()
    page.write_text("\n\n".join(f"<!-- part: {name} -->\n{parts[name]}" for name in PARTS if name in parts) + "\n")
