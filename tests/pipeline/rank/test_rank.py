"""Groups: what is dropped and why, the order, and that ragged groups are kept as they are."""

import logging
import re
import shutil
from collections.abc import Sequence
from datetime import datetime, tzinfo
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from cpo_pipe.data.errors import InputError, MissingInput
from cpo_pipe.data.execution.base import LocalExecutor, Work
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models.chat import Conversation
from cpo_pipe.data.models.embedder import Embedded, Embedder
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.negatives.generate import Plan
from cpo_pipe.pipeline.negatives.strategy import Job, Source
from cpo_pipe.pipeline.rank.candidates import COPY, DUPLICATE, add_ranks, checked_scores
from cpo_pipe.pipeline.rank.rank import plan_groups, rank
from cpo_pipe.pipeline.samples import SampleRequest
from cpo_pipe.pipeline.scorers.embedding import EmbeddingScorer, cosines
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.pipeline.scorers.scorer import Group, Scores
from cpo_pipe.pipeline.scorers.scorer import ScorerDependencies as of
from cpo_pipe.recipe.load import parse_recipe
from tests.support.project import Project

TARGET = [7, 8, 0]


def example(name: str) -> dict[str, Any]:
    return {"example_id": name, "split": "train", "prompt": "p", "rendered": "p", "target": "a red fox",
            "prompt_ids": [5, 6], "target_ids": TARGET, "ends": True, "category": None, "messages": None}  # fmt: skip


def negative(name: str, index: int, token_ids: list[int], text: str, reason: str = "stop") -> dict[str, Any]:
    return {"example_id": name, "sample_index": index, "strategy": "autoregressive", "text": text,
            "token_ids": token_ids, "finish_reason": reason, "logprob": -1.0, "seed": index, "generator": "g",
            "engine": "e"}  # fmt: skip


def sources(store: Store, negatives: list[dict[str, Any]], count: int) -> Plan:
    rows = store.rows("negatives", {"strategy": "autoregressive"})
    with rows.writer() as writer:
        writer.add(negatives)
    names = dict.fromkeys(row["example_id"] for row in negatives)
    selection = pa.Table.from_pylist([example(name) for name in names], schema=EXAMPLES)
    source = Source("autoregressive", SampleRequest(rows, count))
    return Plan(selection, [Job(source, cast(Work, None))])


SAMPLES = [
    negative("x", 0, TARGET, "a red fox"),
    negative("x", 1, [9, 0], "a brown fox"),
    negative("x", 2, [9, 0], "a brown fox"),
    negative("x", 3, [7, 8, 7], "a red fox a", "length"),
    negative("x", 4, [4, 4, 0], "taxes were due in spring"),
]


def test_copies_and_duplicates_are_dropped_with_a_reason(tmp_path: Path) -> None:
    store = Store(tmp_path)
    wanted = sources(store, SAMPLES, 5)
    groups = rank(EmbeddingScorer(), of(store), wanted, LocalExecutor())
    (group,) = groups.read(["x"]).to_pylist()
    kept = [candidate["token_ids"] for candidate in group["candidates"]]
    assert kept == [TARGET, [9, 0], [7, 8, 7], [4, 4, 0]]
    assert [c["candidate_id"] for c in group["candidates"]] == [candidate_id([5, 6], ids) for ids in kept]
    dropped = plan_groups(EmbeddingScorer(), of(store), wanted)[1].read(["x"]).to_pylist()
    assert [(row["source"], row["reason"]) for row in dropped] == [
        ("autoregressive:0", COPY),
        ("autoregressive:2", DUPLICATE),
    ]


def test_what_ends_a_candidate_makes_it_no_other_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    samples = [
        negative("x", 0, [7, 8, 3], "a red fox"),  # by another of the model's end tokens
        negative("x", 1, [7, 8], "a red fox", "length"),  # by the limit of tokens
        negative("x", 2, [7, 8, 0, 0], "a red fox"),  # an end token within is no end
        negative("x", 3, [9, 3], "a brown fox"),
        negative("x", 4, [9, 0], "a brown fox"),
        negative("x", 5, [9], "a brown fox", "length"),
        negative("x", 6, [7, 0], "a red"),  # the target cut short
        negative("x", 7, [0], ""),
    ]
    wanted = sources(store, samples, 8)
    (group,) = rank(EmbeddingScorer(), of(store), wanted, LocalExecutor()).read(["x"]).to_pylist()
    kept = [candidate["token_ids"] for candidate in group["candidates"]]
    assert kept == [TARGET, [7, 8, 0, 0], [9, 0], [7, 0], [0]], "those that end do so like the target"
    dropped = plan_groups(EmbeddingScorer(), of(store), wanted)[1].read(["x"]).to_pylist()
    reasons = {row["source"].partition(":")[2]: row["reason"] for row in dropped}
    assert reasons == {"0": COPY, "1": COPY, "4": DUPLICATE, "5": DUPLICATE}


def test_a_sample_that_ends_where_a_cut_target_goes_on_is_a_copy(tmp_path: Path) -> None:
    store = Store(tmp_path)
    wanted = sources(store, [negative("x", 0, [7, 8, 0], "a red fox"), negative("x", 1, [7, 0], "a red")], 2)
    cut = example("x") | {"target_ids": [7, 8], "ends": False}
    wanted = Plan(pa.Table.from_pylist([cut], schema=EXAMPLES), wanted.jobs)
    (group,) = rank(NoScorer(), of(store), wanted, LocalExecutor()).read(["x"]).to_pylist()
    assert [candidate["token_ids"] for candidate in group["candidates"]] == [[7, 8], [7, 0]]


def test_the_paper_to_the_letter_keeps_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (group,) = (
        rank(
            EmbeddingScorer(drop_duplicates=False),
            of(store),
            sources(store, SAMPLES, 5),
            LocalExecutor(),
        )
        .read(["x"])
        .to_pylist()
    )
    candidates = group["candidates"]
    assert len(candidates) == 6
    assert sorted(c["rank"] for c in candidates) == list(range(6))
    assert candidates[0]["rank"] == 0, "the target is first even beside a cosine of 1"
    assert candidates[1]["similarity"] == pytest.approx(1.0, abs=1e-6)


def test_the_order_is_falling_similarity_to_the_target(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (group,) = rank(EmbeddingScorer(), of(store), sources(store, SAMPLES, 5), LocalExecutor()).read(["x"]).to_pylist()
    by_rank = sorted(group["candidates"], key=lambda c: c["rank"])
    assert [c["text"] for c in by_rank] == ["a red fox", "a red fox a", "a brown fox", "taxes were due in spring"]
    assert by_rank[0]["strategy"] == "target"
    similarities = [c["similarity"] for c in by_rank]
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[-1] < 0.3 < similarities[2]


LONG = "first we add up the apples of each basket and then take away those that were eaten " * 20
"""More than the packaged model reads."""


def test_texts_that_the_embedding_model_does_not_read_to_the_end_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    store = Store(tmp_path)
    samples = [
        negative("x", 0, [9, 0], LONG + "so it is 5"),
        negative("x", 1, [9, 9, 0], LONG + "so it is 7"),
        negative("x", 2, [9, 9, 9, 0], "a brown fox"),
    ]
    wanted = sources(store, samples, 3)
    for _ in range(2):  # the second time nothing is made, and no model is loaded
        caplog.clear()
        (group,) = rank(EmbeddingScorer(), of(store), wanted, LocalExecutor()).read(["x"]).to_pylist()
        assert [candidate["truncated"] for candidate in group["candidates"]] == [False, True, True, False]
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warning == (
            "rank: 2 of 4 texts (50.0%) are longer than the 256 tokens that minilm reads: differences after these are "
            "not seen; set rank.model to a model that reads more, rank.long_texts to average, or shorten the texts"
        )
        assert "; 2 negatives have the same score as another one of their group" in caplog.text
        monkeypatch.setattr(Embedder, "embed", None)


def test_averages_of_chunks_read_all_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    samples = [negative("x", 0, [9, 0], LONG + "so it is 5"), negative("x", 1, [9, 9, 0], "whales swim. " * 100 + LONG)]
    wanted, scorer = sources(store, samples, 2), EmbeddingScorer(long_texts="average")
    (group,) = rank(scorer, of(store), wanted, LocalExecutor()).read(["x"]).to_pylist()
    assert [candidate["truncated"] for candidate in group["candidates"]] == [False] * 3
    vectors = scorer.embedder(store).embed_averaged([candidate["text"] for candidate in group["candidates"]]).vectors
    expected = [candidate["similarity"] for candidate in group["candidates"]]
    np.testing.assert_allclose(vectors @ vectors[0], expected, atol=1e-5)
    assert "longer than" not in caplog.text
    names = {plan_groups(EmbeddingScorer(long_texts=way), of(store), wanted)[0].name for way in ("average", "truncate")}
    assert len(names) == 2
    assert "long_texts" not in EmbeddingScorer().spec(of(store)), "the identity of before"


def test_nothing_is_said_where_all_texts_are_read_and_no_cosines_are_equal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = Store(tmp_path)
    for scorer in (EmbeddingScorer(), NoScorer()):
        (group,) = rank(scorer, of(store), sources(store, SAMPLES, 5), LocalExecutor()).read(["x"]).to_pylist()
        assert {candidate["truncated"] for candidate in group["candidates"]} == {False if scorer.ranks else None}
    assert "longer than" not in caplog.text
    assert "same score" not in caplog.text


def test_ties_go_by_candidate_id() -> None:
    def same(texts: Sequence[str]) -> Embedded:
        return Embedded(np.tile(np.array([1.0, 0.0], np.float32), (len(texts), 1)), np.zeros(len(texts), bool))

    group = [{"candidate_id": name, "text": "t"} for name in ("zz", "m", "b", "q")]
    texts = Group("x", "p", Conversation.of_text("p"), ["t"] * 4)
    add_ranks([group], cosines(same, [texts]))
    assert [candidate["rank"] for candidate in group] == [0, 2, 1, 3]


def test_n_is_taken_from_the_front_and_never_topped_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (group,) = rank(NoScorer(), of(store), sources(store, SAMPLES, 3), LocalExecutor()).read(["x"]).to_pylist()
    assert [c["token_ids"] for c in group["candidates"]] == [TARGET, [9, 0]]
    assert [c["rank"] for c in group["candidates"]] == [None, None]


def test_a_group_may_be_left_alone_and_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store = Store(tmp_path)
    alone = [negative("y", 0, TARGET, "a red fox")]
    groups = rank(EmbeddingScorer(), of(store), sources(store, alone, 1), LocalExecutor())
    assert len(groups.read(["y"])["candidates"].to_pylist()[0]) == 1
    assert "1 groups have no negative left" in caplog.text


@pytest.mark.slow
def test_a_date_in_the_chat_template_stays_on_a_later_day(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(project.model, project.root / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    recipe = (project.root / "tiny.yaml").read_text().replace(str(project.model), str(model))
    recipe = recipe.replace("data: {", "data: {template: chat, ").replace(
        "{model: start, count", f"{{model: {model}, count"
    )
    (project.root / "tiny.yaml").write_text(recipe)

    def run(day: int, rows: int) -> list[str]:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> "Clock":
                return cls(2026, 11, day, tzinfo=tz)

        for module in ("cpo_pipe.data.models.chat_date", "transformers.utils.chat_template_utils"):
            monkeypatch.setattr(f"{module}.datetime", Clock)
        for stage in ("prepare", "train start", "generate-negatives", "rank", "train cpo"):
            command, *names = stage.split()
            result = project.cli(command, "tiny.yaml", *names, "--set", f"data.train={rows}")
            assert result.status == 0, result.err
        return [name for name in project.made() if "/shards/" in name and "groups/" in name]

    first, second = run(28, 8), run(29, 12)
    assert set(first) < set(second)
    (artifact,) = {name.split("/shards/")[0] for name in second}
    groups = [row for name in second for row in pq.read_table(project.store / name).to_pylist()]
    assert len(groups) == 12, artifact
    assert {tokenizer.decode(group["prompt_ids"])[:7] for group in groups} == {"28 Nov "}


def test_missing_negatives_are_not_ranked_around(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(MissingInput, match=r"1 negatives are missing: run `cpo-pipe generate-negatives`"):
        rank(EmbeddingScorer(), of(store), sources(store, SAMPLES, 6), LocalExecutor())


def test_groups_that_are_there_need_no_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    wanted = sources(store, SAMPLES, 5)
    first = rank(EmbeddingScorer(), of(store), wanted, LocalExecutor())
    monkeypatch.setattr(Embedder, "embed", lambda *_: pytest.fail("embedded again"))
    assert rank(EmbeddingScorer(), of(store), wanted, LocalExecutor()).read(["x"]) == first.read(["x"])


def test_reasons_whose_shard_was_damaged_are_found_again(tmp_path: Path) -> None:
    wanted = sources(Store(tmp_path), SAMPLES, 5)
    rank(EmbeddingScorer(), of(Store(tmp_path)), wanted, LocalExecutor())
    dropped = plan_groups(EmbeddingScorer(), of(Store(tmp_path)), wanted)[1]
    before = dropped.read(["x"])
    dropped.files()[0].write_bytes(b"damaged")
    rank(EmbeddingScorer(), of(Store(tmp_path)), wanted, LocalExecutor())
    assert plan_groups(EmbeddingScorer(), of(Store(tmp_path)), wanted)[1].read(["x"]) == before


def test_a_kill_before_the_groups_are_recorded_leaves_no_reason_twice(tmp_path: Path) -> None:
    wanted = sources(Store(tmp_path), SAMPLES, 5)
    groups = rank(EmbeddingScorer(), of(Store(tmp_path)), wanted, LocalExecutor())
    for folder in ("shards", "manifests"):
        shutil.rmtree(tmp_path / groups.name / folder)
    rank(EmbeddingScorer(), of(Store(tmp_path)), wanted, LocalExecutor())
    recorded = [
        row["source"] for file in tmp_path.glob("rejected/*/shards/*") for row in pq.read_table(file).to_pylist()
    ]
    assert sorted(recorded) == ["autoregressive:0", "autoregressive:2"]
    assert groups.read(["x"]).num_rows == 1


def test_a_scorer_of_the_users_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path(__file__).parents[3] / "docs" / "guide" / "custom-ranker.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    project.write("my_rankers.py", code)
    monkeypatch.syspath_prepend(project.root)
    options = ("--set", "rank={by: my_rankers:Overlap, words: false}")
    for stage, *names in (["prepare"], ["train", "start"], ["generate-negatives"], ["rank"]):
        result = project.cli(stage, "tiny.yaml", *names, *options)
        assert result.status == 0, result.err
    (artifact,) = (project.store / "groups").glob("*")
    for group in pq.read_table(artifact / "shards").to_pylist():
        target = group["candidates"][0]["text"]
        for candidate in group["candidates"]:
            expected = SequenceMatcher(None, candidate["text"], target).ratio()
            assert candidate["similarity"] == pytest.approx(expected, abs=1e-6)
        ranked = sorted(group["candidates"], key=lambda candidate: candidate["rank"])
        assert ranked[0] == group["candidates"][0]
        similarities = [candidate["similarity"] for candidate in ranked[1:]]
        assert similarities == sorted(similarities, reverse=True)
    wrong = project.cli("rank", "tiny.yaml", "--set", "rank={by: my_rankers:Overlap, word: false}")
    assert "rank.word is not a known key; did you mean words?" in wrong.err


def test_an_incomplete_scorer_is_refused_when_the_recipe_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = 'from cpo_pipe.pipeline.scorers.scorer import Scorer\nclass Silent(Scorer):\n    """Ranks by nothing."""\n'
    (tmp_path / "silent_ranker.py").write_text(code + "    def spec(self, dependencies): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = {
        "data": {"source": "a.jsonl", "tokenizer": "t", "train": 1},
        "train": {"mle": {"objective": "mle", "init": "m"}},
        "rank": {"by": "silent_ranker:Silent"},
    }
    with pytest.raises(InputError, match="rank: scorer silent_ranker:Silent is incomplete; implement open"):
        parse_recipe(content, "r.yaml")


def test_scores_must_be_one_finite_number_for_each_text() -> None:
    group = [{"candidate_id": "a", "text": "t"}, {"candidate_id": "b", "text": "u"}]
    for scores, message in (
        ([Scores([1.0])], "one finite number for each text"),
        ([Scores([1.0, float("nan")])], "one finite number for each text"),
        ([], "returned 0 Scores for 1 groups"),
        ([Scores([1.0, 0.5], [True])], "must set `truncated` for each text"),
    ):
        with pytest.raises(InputError, match=f"rank.by: the scorer .*{message}"):
            checked_scores(lambda groups: scores, [example("x")], [group], "rank.by")  # noqa: B023
