"""Correct negatives are removed, counted by reason, and shown by `rank` and `quality`."""

import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.quality.measure import measure_quality
from cpo_pipe.pipeline.rank.rank import plan_groups, rank
from cpo_pipe.pipeline.scorers import FILTERS
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.pipeline.scorers.scorer import ScorerDependencies
from tests.support.project import Project
from tests.support.scorers import plan

TARGETS = {"x": "2 + 2 = 4\n#### 4", "y": "7 is 7\n#### 7", "z": "nobody knows"}
NEGATIVES = {
    "x": ["so 4\n#### 4", "so 5\n#### 5", "2 + 2 = 4\n#### 4", "four\n#### $4.00"],
    "y": ["#### 7", "#### 7.0", "7 is 7\n#### 7.", "the answer is #### 7"],
    "z": ["nobody knows!", "#### 4", "nobody", "#### 5"],
}


def texts_of(store: Store, by: dict[str, object], scorer: type = NoScorer) -> dict[str, list[str]]:
    wanted = plan(store, TARGETS, NEGATIVES, FILTERS.parse(by))
    rows = rank(scorer(), ScorerDependencies(store), wanted, LocalExecutor()).read(list(TARGETS)).to_pylist()
    return {row["example_id"]: [candidate["text"] for candidate in row["candidates"][1:]] for row in rows}


def test_negatives_with_the_targets_answer_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store, by = Store(tmp_path), {"by": "exact", "pattern": "gsm8k"}
    wanted = plan(store, TARGETS, NEGATIVES, FILTERS.parse(by))
    for _ in range(2):  # the second time nothing is made
        caplog.clear()
        assert texts_of(store, by) == {"x": ["so 5\n#### 5"], "y": [], "z": NEGATIVES["z"]}
        assert "dropped: 1 copy of the target, 6 correct by exact; 1 groups have no negative left" in caplog.text
        assert "rank: the pattern matches nothing in 1 of 3 targets; their negatives are kept" in caplog.text
    dependencies = ScorerDependencies(store)
    groups, dropped = plan_groups(NoScorer(), dependencies, wanted)
    reasons = {row["source"]: row["reason"] for row in dropped.read(["x"]).to_pylist()}
    assert reasons == {"samples:0": "correct by exact", "samples:2": "copy of the target",
                       "samples:3": "correct by exact"}  # fmt: skip
    table = measure_quality(wanted.selection, wanted.sources, groups, dropped=dropped).table
    assert dict(zip(table["strategy"].to_pylist(), table["correct"].to_pylist(), strict=True)) == {
        "samples": 0.5, "all": 0.5, "target": None,
    }  # fmt: skip
    unfiltered = measure_quality(wanted.selection, wanted.sources, groups).table
    assert unfiltered["correct"].to_pylist() == [None] * 3


def test_the_filter_is_part_of_the_groups_identity(tmp_path: Path) -> None:
    dependencies = ScorerDependencies(Store(tmp_path))
    filters = [None, {"by": "exact"}, {"by": "exact", "pattern": "gsm8k"}, {"by": "similarity", "threshold": 0.9},
               {"by": "similarity", "threshold": 0.8}]  # fmt: skip
    specs = []
    for by in filters:
        wanted = plan(dependencies.store, {"x": "t"}, {"x": ["u"]}, FILTERS.parse(by) if by else None)
        specs.append(plan_groups(NoScorer(), dependencies, wanted)[0].name)
    assert len(set(specs)) == len(specs)


def test_reasons_whose_shard_was_damaged_are_found_again(tmp_path: Path) -> None:
    by = {"by": "exact", "pattern": "gsm8k"}
    texts_of(Store(tmp_path), by)
    wanted = plan(Store(tmp_path), TARGETS, NEGATIVES, FILTERS.parse(by))
    dropped = plan_groups(NoScorer(), ScorerDependencies(Store(tmp_path)), wanted)[1]
    before = dropped.read(list(TARGETS)).sort_by("source")
    dropped.files()[0].write_bytes(b"damaged")
    rank(NoScorer(), ScorerDependencies(Store(tmp_path)), wanted, LocalExecutor())
    again = plan_groups(NoScorer(), ScorerDependencies(Store(tmp_path)), wanted)[1]
    assert again.read(list(TARGETS)).sort_by("source") == before


def test_batches_of_groups_drop_the_same(tmp_path: Path) -> None:
    by = FILTERS.parse({"by": "exact", "pattern": "gsm8k"})
    found = []
    for size in (1, 2, 64):
        store = Store(tmp_path / str(size))
        wanted = plan(store, TARGETS, NEGATIVES, by)
        groups = rank(NoScorer(batch_size=size), ScorerDependencies(store), wanted, LocalExecutor())
        found.append(groups.read(list(TARGETS)).to_pylist())
    assert found[0] == found[1] == found[2]


def test_paraphrases_are_dropped_by_similarity_and_the_others_ranked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    target = "The train leaves the station at nine in the morning."
    negatives = [
        "The train departs from the station at 9 in the morning.",
        "Cats sleep most of the day.",
        "Taxes rise.",
    ]
    wanted = plan(store, {"x": target}, {"x": negatives}, FILTERS.parse({"by": "similarity", "threshold": 0.85}))
    (row,) = rank(EmbeddingScorer(), ScorerDependencies(store), wanted, LocalExecutor()).read(["x"]).to_pylist()
    assert [candidate["text"] for candidate in row["candidates"]] == [target, *negatives[1:]]
    assert sorted(candidate["rank"] for candidate in row["candidates"]) == [0, 1, 2]


def test_texts_that_differ_after_the_window_are_no_paraphrases(tmp_path: Path) -> None:
    store = Store(tmp_path)
    start = "first we add up the apples of each basket and then take away those that were eaten " * 20
    negatives = [start + "but whales are mammals that live in all the oceans of the earth " * 15]
    wanted = plan(
        store,
        {"x": start + "so it is five. " * 15},
        {"x": negatives},
        FILTERS.parse({"by": "similarity", "threshold": 0.98}),
    )
    (row,) = rank(NoScorer(), ScorerDependencies(store), wanted, LocalExecutor()).read(["x"]).to_pylist()
    assert len(row["candidates"]) == 2


def test_a_filter_that_cannot_work_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    wanted = plan(store, {"x": "4"}, {"x": ["5"]}, FILTERS.parse({"by": "exact", "pattern": "gsm8k"}))
    with pytest.raises(InputError, match=r"^negatives\.drop_correct\.pattern is 'gsm8k': it matches none of the 1 tar"):
        rank(NoScorer(), ScorerDependencies(store), wanted, LocalExecutor())


def test_a_run_drops_correct_negatives_and_says_so(made: Project) -> None:
    option = ("--set", "negatives.drop_correct={by: exact, pattern: '([a-z])'}")
    ranked = made.cli("rank", "tiny.yaml", *option)
    assert ranked.status == 0, ranked.err
    assert "correct by exact" in ranked.err
    reasons = [
        row["reason"]
        for file in (made.store / "rejected").rglob("*.parquet")
        for row in pq.read_table(file).to_pylist()
    ]
    quality = made.cli("quality", "tiny.yaml", *option)
    assert "dropped as correct" in quality.out
    assert reasons.count("correct by exact") > 0
    assert "dropped as correct" not in made.cli("quality", "tiny.yaml").out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "negatives.drop_correct: by is missing; choose from exact, judge, similarity"),
        ({"by": "exakt"}, "negatives.drop_correct: unknown filter 'exakt'; did you mean exact?"),
        (
            {"by": "exact", "threshold": 0.5},
            'negatives.drop_correct.threshold: not used by filter "exact" (but by judge',
        ),
        ({"by": "exact", "pattern": "####"}, "negatives.drop_correct.pattern: '####' has no group"),
        ({"by": "similarity"}, "negatives.drop_correct.threshold is missing"),
        ({"by": "similarity", "threshold": 2}, "negatives.drop_correct.threshold is 2: "),
        ({"by": "judge", "api": "gpt"}, "negatives.drop_correct.api 'gpt' is not in `apis`"),
        ("exact", "negatives.drop_correct is 'exact': must be a section"),
    ],
)
def test_wrong_settings_are_named(project: Project, settings: object, message: str) -> None:
    result = project.cli("rank", "tiny.yaml", "--set", f"negatives.drop_correct={settings}".replace("'", '"'))
    assert result.status == 2
    assert message in result.error()
