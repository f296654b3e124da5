"""All stages with Ray's workers make the rows that they make here."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.store import Store
from tests.support.project import Project

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow

EXACT = {
    "negatives": ["example_id", "sample_index", "text", "token_ids", "finish_reason", "seed", "generator"],
    "groups": ["example_id", "prompt_ids"],
    "generations": ["example_id", "sample_index", "text", "token_ids", "finish_reason"],
}


def tables(store: Path, kind: str, columns: list[str]) -> dict[str, pa.Table]:
    """Of each artifact of a kind its rows, in the order of their examples, by its address."""
    found = {}
    for spec in store.glob(f"{kind}/*/spec.json"):
        rows = Store(store).rows(kind, json.loads(spec.read_text()))
        ids = pa.concat_tables(pq.read_table(file, columns=["example_id"]) for file in rows.files())["example_id"]
        found[spec.parent.name] = rows.read(sorted(set(ids.to_pylist())), columns)
    return found


def test_ray_makes_the_same_rows(project: Project) -> None:
    sources = ("autoregressive.count=2", "batch={}", "meanfield={model: start}", "truncation={}")
    settings = [part for source in sources for part in ("--set", f"negatives.sources.{source}")]
    try:
        for store, options in (("here", []), ("there", ["--executor", "ray", "--workers", "1"])):
            result = project.cli("run", "tiny.yaml", "--store", store, *settings, *options)
            assert result.status == 0, result.err
            assert "Warning" not in result.err
    finally:
        sys.modules["ray"].shutdown()
    here, there = project.root / "here", project.root / "there"
    for kind, columns in EXACT.items():
        left, right = tables(here, kind, columns), tables(there, kind, columns)
        common = left.keys() & right.keys()
        # A log-prob's last digits may depend on what is computed beside it, and so may what is trained with it.
        assert len(common) == len(left) or (kind == "generations" and common)
        assert all(left[hash_] == right[hash_] for hash_ in common), kind
    columns = ["example_id", "candidate_id", "logprob"]
    left, right = tables(here, "reference-logprobs", columns), tables(there, "reference-logprobs", columns)
    for hash_ in left.keys() & right.keys():
        assert left[hash_]["candidate_id"] == right[hash_]["candidate_id"]
        assert left[hash_]["logprob"].to_pylist() == pytest.approx(right[hash_]["logprob"].to_pylist(), rel=1e-5)
    assert not list(there.rglob("worklist-*"))
