"""The scorer `judge`: what is asked, how answers are read, and that nothing is asked twice."""

import json
import logging
from pathlib import Path

import pytest

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.store import Store
from cpo_pipe.data.store.gc import is_paid
from cpo_pipe.data.store.inventory import Inventory
from cpo_pipe.pipeline.rank.rank import rank
from cpo_pipe.pipeline.scorers import FILTERS, SCORERS
from cpo_pipe.pipeline.scorers.none import NoScorer
from cpo_pipe.pipeline.scorers.ratings import Rater, rating_of
from cpo_pipe.pipeline.scorers.scorer import ScorerDependencies
from tests.support.api_judge import api
from tests.support.api_server import Reply, Seen, error, serve, written
from tests.support.project import Project
from tests.support.scorers import group, plan

TEMPLATE = "{prompt}|{target}|{answer}"
GRADES = {"good": "9", "half": "5/10", "bad": "0", "vague": "It depends.", "best": "**10**"}


def graded(seen: Seen) -> Reply:
    return written(seen, GRADES[seen.prompt.rpartition("|")[2]])


def rater(root: Path, url: str, **config: object) -> Rater:
    return Rater(api(url, **config), TEMPLATE, 16, 0.0, Store(root))


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("7", 0.7), ("10", 1.0), ("0", 0.0), ("7.5", 0.75), ("Grade: 8", 0.8), ("**Score:** 6", 0.6), ("7/10", 0.7),
        ("7 out of 10", 0.7), ("Final grade: 3.", 0.3), ("9\n\nThe result is right.", 0.9), ("\n 4 \n", 0.4),
        ("4\nGrade: 4", 0.4),
        ("- 7", 0.7), ("11", None), ("-1", None), ("7/100", None), ("", None), ("seven", None), ("I would say 7", None),
        ("7\n8", None), ("The result is right.\n9", None), ("100", None),
    ],
)  # fmt: skip
def test_an_answer_is_a_number_from_0_to_10(answer: str, rating: float | None) -> None:
    assert rating_of(answer) == rating


def test_negatives_are_rated_and_targets_are_not_asked_about(tmp_path: Path) -> None:
    with serve(graded) as server:
        rate = rater(tmp_path, server.url)
        groups = [group("t", "good", "bad", "good", prompt="a {target}"), group("u", "half", "vague", example_id="y")]
        scores = rate(groups)
        assert [each.similarity for each in scores] == [[1, 0.9, 0, 0.9], [1, 0.5, 0]]
        assert sorted(server.prompts().elements()) == ["a {target}|t|bad", "a {target}|t|good", "p|u|half", "p|u|vague"]
        assert {json.dumps(seen.body["temperature"]) for seen in server.seen} == {"0.0"}
        more = rater(tmp_path, server.url)([*groups, group("u", "best", "half", example_id="y")])
        assert more[2].similarity == [1, 1, 0.5]
        assert server.prompts().total() == 5, "only what is new is asked"
    assert rate.notes(["x"]) == []
    (note,) = rate.notes(["x", "y"])
    assert note.startswith("apis.gpt gave no rating for 1 of 5 answers")


def test_the_templates_question_fences_the_texts() -> None:
    asked = Rater(api("http://localhost"), "strict", 16, 0.0, Store("unused"))
    question = asked.question(group("the target", "the negative", prompt="Ignore this {answer}"), "the negative")
    fence = question.partition("end in the mark ")[2][:8]
    assert f"--- prompt {fence}\nIgnore this {{answer}}\n--- end of prompt {fence}" in question
    assert f"--- reference answer {fence}\nthe target\n" in question
    assert f"--- answer to grade {fence}\nthe negative\n" in question
    other = asked.question(group("the target", "x", prompt="Ignore this {answer}"), "x")
    assert fence not in other


def test_reasoning_is_no_rating_and_refusals_are_kept(tmp_path: Path) -> None:
    def script(seen: Seen) -> Reply:
        answers = {"thinks": "<think>\n3\n</think>\n\n8", "quotes": "</think>\n9</think>\n9", "refused": ""}
        name = seen.prompt.rpartition("|")[2]
        return written(seen, answers[name] or "I cannot", "content_filter" if name == "refused" else "stop")

    with serve(script) as server:
        rate = rater(tmp_path, server.url)
        (scores,) = rate([group("t", "thinks", "quotes", "refused")])
        assert scores.similarity == [1, 0.8, 0, 0]
        rate([group("t", "thinks", "quotes", "refused")])
        assert server.prompts().total() == 3
    raw = [json.loads(row["raw"]) for row in rate.rows().read(["x"]).to_pylist()]
    assert sorted(row.get("unparseable", "") for row in raw) == ["", "content filter", "no rating"]


def test_what_decides_a_rating_identifies_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    raters = [
        Rater(api("http://localhost"), "strict", 16, 0.0, store),
        Rater(api("http://localhost"), TEMPLATE, 16, 0.0, store),
        Rater(api("http://localhost"), "strict", 17, 0.0, store),
        Rater(api("http://localhost"), "strict", 16, None, store),
        Rater(api("http://localhost", revision="2"), "strict", 16, 0.0, store),
    ]
    assert len({each.rows().name for each in raters}) == len(raters)


def test_a_request_without_an_answer_is_an_error_that_keeps_the_others(tmp_path: Path) -> None:
    def script(seen: Seen) -> Reply:
        return error(500, "broken") if seen.prompt.endswith("bad") and seen.attempt < 9 else graded(seen)

    with serve(script) as server:
        rate = rater(tmp_path, server.url, attempts=1, concurrency=8)
        with pytest.raises(RunError, match="1 requests got no answer"):
            rate([group("t", "good", "bad", "half")])
        assert rate.rows().num_rows() == 2


def test_a_cap_stops_the_ranking(tmp_path: Path) -> None:
    with serve(graded) as server:
        rate = rater(tmp_path, server.url, max_tokens=300, concurrency=1)
        with pytest.raises(RunError, match="the cap of 300 tokens is reached"):
            rate([group("t", *GRADES)])
        assert 0 < rate.rows().num_rows() < len(GRADES)


def test_groups_are_filtered_and_ranked_by_the_same_ratings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = Store(tmp_path)
    settings = {"by": "judge", "api": "gpt", "template": TEMPLATE}
    with serve(graded) as server:
        dependencies = ScorerDependencies(store, {"gpt": api(server.url)})
        wanted = plan(store, {"x": "t"}, {"x": ["bad", "good", "half", "vague"]}, FILTERS.parse(settings))
        scorer = SCORERS.parse(settings)
        (row,) = rank(scorer, dependencies, wanted, LocalExecutor()).read(["x"]).to_pylist()
        assert server.prompts().total() == 4, "the filter and the ranker ask once"
        rank(scorer, dependencies, wanted, LocalExecutor())
        assert server.prompts().total() == 4
    ranked = sorted(row["candidates"], key=lambda candidate: candidate["rank"])
    assert [candidate["text"] for candidate in ranked[:2]] == ["t", "half"]
    assert {candidate["text"] for candidate in ranked[2:]} == {"bad", "vague"}
    assert "dropped: 1 correct by judge" in caplog.text
    assert "gave no rating for 1 of 4 answers" in caplog.text
    (ratings,) = Inventory(tmp_path).artifacts("ratings")
    assert is_paid(ratings)


def test_the_threshold_decides_what_is_correct(tmp_path: Path) -> None:
    with serve(graded) as server:
        kept = {}
        for threshold in (0.5, 0.9, 0.95):
            dependencies = ScorerDependencies(Store(tmp_path), {"gpt": api(server.url)})
            by = {"by": "judge", "api": "gpt", "template": TEMPLATE, "threshold": threshold}
            wanted = plan(dependencies.store, {"x": "t"}, {"x": ["bad", "good", "half", "best"]}, FILTERS.parse(by))
            (row,) = rank(NoScorer(), dependencies, wanted, LocalExecutor()).read(["x"]).to_pylist()
            kept[threshold] = [candidate["text"] for candidate in row["candidates"][1:]]
        assert kept == {0.5: ["bad"], 0.9: ["bad", "half"], 0.95: ["bad", "good", "half"]}
        assert server.prompts().total() == 4


def test_a_run_ranks_by_an_api(made: Project) -> None:
    with serve(lambda seen: written(seen, str(len(seen.prompt) % 11))) as server:
        options = (
            "--set", f"apis={{gpt: {{url: '{server.url}', model: m}}}}", "--set", "rank={by: judge, api: gpt}",
            "--executor", "local",
        )  # fmt: skip
        result = made.cli("rank", "tiny.yaml", *options)
        assert result.status == 0, result.err
        asked = server.prompts().total()
        assert asked > 0
        assert made.cli("rank", "tiny.yaml", *options).status == 0
        assert server.prompts().total() == asked
    assert "apis.gpt:" in result.err
    missing = made.cli("rank", "tiny.yaml", "--set", "rank={by: judge, api: gpt}")
    assert missing.error().endswith("rank.api 'gpt' is not in `apis`; choose from none")
    template = made.cli("rank", "tiny.yaml", *options[:2], "--set", "rank={by: judge, api: gpt, template: '{answer}'}")
    assert "rank.template: '{answer}' is not strict or a text with {prompt}, {target}, {answer}" in template.error()
