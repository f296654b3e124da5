"""docs/results.md: commands write a part of it each."""

import re
from pathlib import Path

PARTS = ("real model: text", "real model: questions", "tiny model")
"""In the order in which the page shows them."""


def write_part(page: Path, part: str, text: str) -> None:
    """Write a part of the page, and leave the others as they are."""
    written = page.read_text() if page.exists() else ""
    parts = dict(re.findall(r"<!-- part: (.+?) -->\n(.*?)\n*(?=<!-- part: |\Z)", written, re.DOTALL))
    parts[part] = text.strip()
    page.write_text("\n\n".join(f"<!-- part: {name} -->\n{parts[name]}" for name in PARTS if name in parts) + "\n")
