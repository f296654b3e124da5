"""A small store of rows and a checkpoint, for the tests of what a store holds."""

import hashlib
import json
import socket
from pathlib import Path

import pyarrow as pa

from cpo_pipe.data.store import Artifact, Rows, Store
from cpo_pipe.data.store.folder import ArtifactFolder
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.data.store.verify import faults

SPEC = {"model": "m", "dtype": "float32"}


def rows_of(root: Path, **changed: str) -> Rows:
    return Store(root).rows("reference-logprobs", {**SPEC, **changed})


def checkpoint_of(root: Path) -> Artifact:
    return Store(root).artifact("checkpoints", {"settings": {"max_steps": 2}})


def write(rows: Rows, *examples: str) -> None:
    content = [{"example_id": e, "candidate_id": "c", "logprob": 0.0, "num_tokens": 1} for e in examples]
    with rows.lock():
        rows.append(pa.Table.from_pylist(content, schema=rows.schema))


def register(root: Path, run_dir: Path, *names: str, host: str = socket.gethostname()) -> Path:
    (root / ".runs").mkdir(exist_ok=True)
    file = root / ".runs" / f"{hashlib.sha256(f'{run_dir}{host}'.encode()).hexdigest()}.json"
    file.write_text(json.dumps({"run_dir": str(run_dir), "host": host, "artifacts": names}))
    return file


def table_of(root: Path) -> ArtifactFolder:
    return Inventory(root).find("reference-logprobs/")


def content_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def found_in(artifact: ArtifactFolder) -> list[str]:
    return list(faults(artifact, lambda size: None))


def first_manifest(artifact: ArtifactFolder) -> Path:
    return artifact.path / f"manifests/{next(iter(artifact.shards))}.json"
