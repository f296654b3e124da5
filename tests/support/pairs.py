"""Ground-truth pairs and the files they are read from."""

import json
from pathlib import Path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Ground-truth rows, each unlike the others."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    return [
        {"prompt": f"say {words[i % 8]} {i}", "target": f"{words[i % 7]} {words[i % 5]} {i * 7}"}
        for i in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
