"""The scale `smoke` of a recipe that declares none: the same models on little data, for a few steps."""

from collections.abc import Iterator
from typing import Any

SMOKE = "smoke"


def shrink(content: dict[str, Any]) -> None:
    """Lower data, steps, batches and lengths in a recipe's content, to check in minutes that all of it runs."""
    data = _section(content, "data")
    sources = [*_sections(_section(data, "sources"))]
    for source in sources or [data]:
        _lower(source, "max_rows", 300)
    for key in ("train", "validation", "test"):
        if key in data:
            _lower(data, key, 24)
    for training in _sections(_section(content, "train")):
        _lower(training, "max_steps", 3)
        _lower(training, "batch_size", 4)
        if "validation" in training:
            _lower(training, "validation", 4)
    if isinstance(negatives := content.get("negatives"), dict):
        _lower(negatives, "max_examples", 16)
        for source in _sections(_section(negatives, "sources")):
            for key, most in (("max_new_tokens", 32), ("count", 8)):
                if key in source:
                    _lower(source, key, most)
    if isinstance(evaluate := content.get("evaluate"), dict):
        _lower(evaluate, "examples", 8)
        _lower(evaluate, "max_new_tokens", 24)
        _lower(evaluate, "bootstrap", 100)


def _lower(section: dict[str, Any], key: str, most: int) -> None:
    value = section.get(key)
    section[key] = min(value, most) if isinstance(value, int) else most


def _section(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _sections(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (value for value in content.values() if isinstance(value, dict))
