"""The data of the report's browser of examples: the evaluated prompts, their outputs and verdicts.

Lines of JSON, the first with the names of outputs and comparisons, then one per example; gzip in base64, so that
thousands of examples fit into one file.
"""

import base64
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from cpo_pipe.data.text import visible

MAX_PACKED = 10_000_000
"""Bytes of gzip after which no example is added. Base64 adds a third; a page stays below 15 MB."""

_GZIP = 16 + zlib.MAX_WBITS
_COMPARISON = ("judge", "system", "decoding", "opponent")


def pack(examples: pa.Table, outputs: pa.Table, verdicts: pa.Table, scores: pa.Table | None = None) -> tuple[str, int]:
    """Return the examples with their outputs and verdicts, as many as fit, in base64; and the number of these examples.

    Args:
        examples: the selection, in order (EXAMPLES schema).
        outputs: `example_id`, `system`, `decoding`, `text`.
        verdicts: how the outputs were judged (VERDICTS schema).
        scores: of the outputs, in one metric (VALUES schema), to sort by.
    """
    gzip = zlib.compressobj(9, zlib.DEFLATED, _GZIP)
    chunks, size, count = list[bytes](), 0, -1  # the first line is no example
    for line in _lines(examples, outputs, verdicts, scores):
        chunks.append(gzip.compress(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"))
        size, count = size + len(chunks[-1]), count + 1
        if size > MAX_PACKED:
            break
    chunks.append(gzip.flush())
    return base64.b64encode(b"".join(chunks)).decode(), count


def _lines(
    examples: pa.Table, outputs: pa.Table, verdicts: pa.Table, scores: pa.Table | None
) -> Iterator[Mapping[str, Any]]:
    texts: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for row in outputs.to_pylist():
        texts[row["example_id"]][row["system"], row["decoding"]] = row["text"]
    columns = list(dict.fromkeys(column for written in texts.values() for column in written))
    judged: dict[str, dict[tuple[str, ...], Mapping[str, Any]]] = defaultdict(dict)
    for row in verdicts.to_pylist():
        orders = [{"order": asked["order"], "winner": asked["winner"], "said": _said(row, asked)}
                  for asked in row["orders"]]  # fmt: skip
        of = tuple(row[name] for name in _COMPARISON)
        judged[row["example_id"]][of] = {"winner": row["winner"], "orders": orders}
    scored: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in scores.to_pylist() if scores is not None else []:
        scored[row["example_id"]][row["system"], row["decoding"]] = round(row["value"], 4)
    metric = scores["metric"][0].as_py() if scores is not None and scores.num_rows else None
    comparisons = list(dict.fromkeys(of for found in judged.values() for of in found))
    named = [dict(zip(_COMPARISON, of, strict=True)) for of in comparisons]
    yield {"columns": columns, "comparisons": named, "metric": metric}
    for example in examples.select(["example_id", "category", "rendered", "target"]).to_pylist():
        written, found = texts[example["example_id"]], judged[example["example_id"]]
        yield {
            "id": example["example_id"],
            "category": visible(example["category"] or ""),
            "prompt": visible(example["rendered"]),
            "target": visible(example["target"]),
            "outputs": [visible(written[column]) if column in written else None for column in columns],
            "verdicts": [found.get(of) for of in comparisons],
            "scores": [scored[example["example_id"]].get(column) for column in columns],
        }


def _said(verdict: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return the judge's measurements or answer, in words."""
    names = {"a": verdict["system"], "b": verdict["opponent"]}
    said = {names.get(key, key): value for key, value in json.loads(asked["raw"]).items()}
    if asked["p_a"] is not None:
        said[f"P({names['a']} is better)"] = asked["p_a"]
    return visible("; ".join(f"{name}: {_shown(value)}" for name, value in said.items()))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
