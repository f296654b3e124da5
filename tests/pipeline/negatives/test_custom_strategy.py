"""A strategy of the user's own, as the guide has it."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.project import Project


def test_a_strategy_from_outside_the_package_makes_groups(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path(__file__).parents[3] / "docs" / "guide" / "custom-strategy.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    project.write("my_strategies.py", code)
    monkeypatch.syspath_prepend(project.root)
    settings = "{strategy: 'my_strategies:Shuffled', count: 3, keep: 1}"
    options = ("--set", f"negatives.sources.mixed={settings}", "--set", "rank.drop_duplicates=false")
    for stage, *names in (["prepare"], ["train", "start"], ["generate-negatives"], ["rank"]):
        result = project.cli(stage, "tiny.yaml", *names, *options)
        assert result.status == 0, result.err
    (artifact,) = (project.store / "groups").glob("*")
    for group in pq.read_table(artifact / "shards").to_pylist():
        target = group["candidates"][0]["token_ids"]
        mixed = [row["token_ids"] for row in group["candidates"] if row["strategy"] == "mixed"]
        assert len(mixed) == 3
        assert all(sorted(ids) == sorted(target) and ids[0] == target[0] for ids in mixed)
    wrong = project.cli("rank", "tiny.yaml", "--set", f"negatives.sources.mixed={settings.replace('keep', 'kep')}")
    assert "negatives.sources.mixed.kep is not a known key; did you mean keep?" in wrong.err
    wrong = project.cli("rank", "tiny.yaml", "--set", "negatives.sources.mixed={strategy: 'my_strategies:random'}")
    assert "strategy my_strategies:random must be a subclass of" in wrong.err
    wrong = project.cli("rank", "tiny.yaml", "--set", "negatives.sources.mixed={strategy: 'my_strategies:Strategy'}")
    assert "strategy my_strategies:Strategy is incomplete; implement plan" in wrong.err
