"""Ground truth in files, and the section `data` of a recipe."""

import json
from pathlib import Path

from cpo_pipe.pipeline.prepare.base import Data
from cpo_pipe.pipeline.prepare.presets import PRESETS


def data(**settings) -> Data:
    """The section `data` of a recipe."""
    return PRESETS.parse(settings)


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n, start=0):
    return [{"prompt": f"question {i}", "target": f"answer {i}"} for i in range(start, start + n)]


def by_split(examples, column="prompt"):
    return {name: examples.read(name)[column].to_pylist() for name in ("train", "validation", "test")}
