"""Blocks from outside the package, those of the guide, together: from the recipe to report, model card and export."""

import json
import re
from difflib import SequenceMatcher
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.project import Project

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
MODULES = {
    "negatives": "my_engines",
    "custom-strategy": "my_strategies",
    "custom-objective": "ipo",
    "custom-ranker": "my_rankers",
    "custom-judge": "my_judges",
}
SETTINGS = [
    "negatives.sources.autoregressive.engine='my_engines:Loop'",
    "evaluate.engine='my_engines:Loop'",
    "negatives.sources.shuffled={strategy: 'my_strategies:Shuffled', count: 2}",
    "train.own={init: start, reference: start, objective: 'ipo:IPO', tau: 0.5, max_steps: 2, batch_size: 4}",
    "rank={by: 'my_rankers:Overlap', words: false}",
    "evaluate.judges={topic: {kind: 'my_judges:OnTopic', min_letters: 2}}",
    "evaluate.systems.own={model: own}",
]


@pytest.mark.slow
def test_own_blocks_go_from_the_recipe_to_report_card_and_export(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page, module in MODULES.items():
        (code,) = re.findall(r"```python\n(.*?)```", (GUIDE / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
        project.write(f"{module}.py", code)
    monkeypatch.syspath_prepend(str(project.root))
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    done = project.cli("run", "tiny.yaml", *options)
    assert done.status == 0, done.err

    (groups,) = (project.store / "groups").glob("*")
    made = [group["candidates"] for group in pq.read_table(groups / "shards").to_pylist()]
    assert {row["strategy"] for rows in made for row in rows} == {"target", "autoregressive", "shuffled"}
    for target, *negatives in made:
        for row in negatives:
            shared = SequenceMatcher(None, row["text"], target["text"]).ratio()
            assert row["similarity"] == pytest.approx(shared), "Overlap by characters: its setting arrived"

    for kind in ("negatives", "generations"):
        shards = [pq.read_table(path) for path in (project.store / kind).glob("*/shards/*")]
        engines = {engine for shard in shards for engine in shard["engine"].to_pylist()}
        assert engines - {None} == {"loop, float32"}, kind
    artifacts = sorted((project.store / "negatives").iterdir())
    again = project.cli("generate-negatives", "tiny.yaml", *options[2:])
    assert "(0 made, 48 reused)" in again.err, "other engines find the rows"
    assert sorted((project.store / "negatives").iterdir()) == artifacts

    (folder,) = (path.parent for path in project.root.glob("runs/tiny/2*/report.html"))
    metrics = {(row["system"], row["metric"]) for row in pq.read_table(folder / "metrics.parquet").to_pylist()}
    assert {("own", "topic coverage"), ("own", "topic win rate")} <= metrics
    specs = [json.loads(path.read_text(encoding="utf-8")) for path in project.store.glob("verdicts/*/spec.json")]
    assert [spec["min_letters"] for spec in specs] == [2]
    report = (folder / "report.html").read_text(encoding="utf-8")
    for name in ("my_engines:Loop", "shuffled", "ipo:IPO", "my_rankers:Overlap", "topic coverage"):
        assert name in report, name

    cards = [path.read_text(encoding="utf-8") for path in (project.store / "checkpoints").glob("*/README.md")]
    (card,) = [card for card in cards if "squared distance of each log-ratio margin to its goal" in card]
    assert "Azar et al. 2023" in card
    assert "tau: 0.5\n" in card

    exported = project.cli("export", "tiny.yaml", "--out", "out", "--pair", "target,shuffled", *options)
    assert exported.status == 0, exported.err
    pairs = [row for file in sorted((project.root / "out" / "data").glob("*.parquet"))
             for row in pq.read_table(file).to_pylist()]  # fmt: skip
    assert {(row["chosen_strategy"], row["rejected_strategy"]) for row in pairs} == {("target", "shuffled")}
    assert "shuffled" in (project.root / "out" / "README.md").read_text(encoding="utf-8")
