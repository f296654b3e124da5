"""Each small file of a store and of a run folder, damaged in each way: the next run is a complete one, and says so."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest

from tests.support.marks import slow_except

DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(256)),
    "another type": lambda content: b"[1, 2]",
    "another form": lambda content: b'{"files": {}, "artifacts": 3, "stages": {"x": {"seconds": "1"}}, "rows": "7"}',
}
SAID = [
    {
        "runs/tiny/latest/run.json": r"run\.json is damaged and was moved to run\.json\.damaged-\d+",
        "cpo-store/.runs/*.json": r"cpo-store/\.runs/{name} is damaged; written again",
        "cpo-store/file-hashes.json": r"file-hashes\.json is damaged or of another version; the files are hashed again",
        "cpo-store/examples/*/spec.json": r"examples/{folder}: spec\.json was gone or damaged; made again",
        "cpo-store/checkpoints/*/spec.json": r"checkpoints/{folder}: spec\.json was gone or damaged; made again",
        "cpo-store/negatives/*/spec.json": r"negatives/{folder}: spec\.json was gone or damaged; made again",
        "cpo-store/negatives/*/manifests/*.json": r"negatives/\w+: the manifest of shard {stem} was damaged;",
        "cpo-store/groups/*/manifests/*.json": r"groups/\w+: the manifest of shard {stem} was damaged; made again",
    },
    {
        "runs/tiny/latest/report.html": r"report\.html.*: missing or changed; writing it again",
        "runs/tiny/latest/metrics.md": r"metrics\.md.*: missing or changed; writing it again",
        "runs/tiny/latest/model_outputs/cpo/*.json": r"model_outputs/cpo/greedy\.json.*: missing or changed; writing",
    },
    {
        "cpo-store/examples/*/manifest.json": r"examples/{folder} is damaged \(manifest\.json\); .* made again",
        "cpo-store/checkpoints/*/manifest.json": r"checkpoints/{folder} is damaged \(manifest\.json\); .* made again",
        "cpo-store/metrics/*/manifest.json": r"metrics/{folder} is damaged \(manifest\.json\); .* made again",
    },
]
"""By a file's place, what the run says; those of a part are damaged together."""


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_run_is_complete_and_names_the_file(made, damage: str) -> None:
    shutil.rmtree(made.store / ".runs")  # of the folder that this one was copied from
    assert made.cli("run", "tiny.yaml").status == 0
    intact, metrics = made.made(), pq.read_table(made.root / "runs/tiny/latest/metrics.parquet")
    outputs = (made.root / "runs/tiny/latest/metrics.md").read_bytes()
    for part in SAID:
        paths = {place: next(made.root.glob(place)) for place in part}
        for path in paths.values():
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
        assert made.cli("store", "verify").status == 1
        result = made.cli("run", "tiny.yaml")
        assert result.status == 0, result.err
        for place, path in paths.items():
            pattern = part[place].format(name=re.escape(path.name), folder=path.parent.name, stem=path.stem)
            assert re.search(pattern, result.err), f"{place}: {result.err}"
            if path.suffix == ".json":
                json.loads(path.read_bytes())
        verified = made.cli("store", "verify")
        assert verified.status == 0, verified.out
    assert intact.keys() <= made.made().keys()
    assert pq.read_table(made.root / "runs/tiny/latest/metrics.parquet").equals(metrics)
    assert (made.root / "runs/tiny/latest/metrics.md").read_bytes() == outputs


@pytest.mark.parametrize(
    "deleted", slow_except(["report.html", "metrics.md", "model_outputs/cpo/greedy.json"], "metrics.md")
)
def test_what_was_deleted_comes_back(made, deleted: str) -> None:
    assert made.cli("run", "tiny.yaml").status == 0
    path = made.root / "runs/tiny/latest" / deleted
    path.unlink()
    assert f"{deleted}: missing or changed; writing it again" in made.cli("run", "tiny.yaml").err
    assert path.is_file()
