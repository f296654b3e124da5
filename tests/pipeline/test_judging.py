"""Judges in a whole run: what they cost beforehand, what they are asked, and that nothing is asked twice."""

from zlib import crc32

import pyarrow.parquet as pq
import pytest

from cpo_pipe.pipeline.engines import openai
from tests.pipeline.api_server import Reply, Seen, error, serve, written
from tests.pipeline.conftest import Project


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_BACKOFF", 0.01)
    monkeypatch.setattr(openai, "_LONGEST_BACKOFF", 0.1)
    monkeypatch.setattr(openai, "_TOGETHER", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def options(url: str, judges: str, *more: str) -> list[str]:
    api = f"apis={{mini: {{url: '{url}', model: m, attempts: 2, input_price: 1000, output_price: 2000}}}}"
    sets = [api, f"evaluate.judges={judges}", "evaluate.baseline=ground-truth", *more]
    return [part for value in sets for part in ("--set", value)]


def first(seen: Seen) -> Reply:
    return written(seen, "A")


PAIRS = 8
"""What two systems write for four test examples, against the targets."""


def test_what_is_said_beforehand_is_what_is_asked(made: Project) -> None:
    with serve(first) as server:
        arguments = ["tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini}, longer: {}}")]
        before = made.made()
        dry = made.cli("evaluate", *arguments, "--dry-run")
        assert dry.status == 0, dry.err
        assert (server.seen, made.made()) == ([], before)
        head, note = dry.out.splitlines()
        assert head.startswith(f"judge taste (apis.mini): {2 * PAIRS} calls to be made, about ")
        prompt = int(head.split("about ")[1].split()[0].replace(",", ""))
        assert f"at most {2 * PAIRS * 16} written: about {(prompt + 2 * 2 * PAIRS * 16) / 1000:.4g} US dollars" in head
        assert note == "prompt tokens are estimated: one for every 4 bytes of UTF-8"

        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert len(server.seen) == 2 * PAIRS
        assert prompt == sum(-(-len(seen.prompt.encode()) // 4) for seen in server.seen)

        again = made.cli("evaluate", *arguments)
        assert again.status == 0, again.err
        # Another product, of the same verdicts: figures are made, and nothing is asked.
        assert made.cli("evaluate", *arguments, "--set", "evaluate.bootstrap=60").status == 0
        assert len(server.seen) == 2 * PAIRS
        assert "judge taste (apis.mini): 0 calls" in made.cli("evaluate", *arguments, "--dry-run").out


def test_figures_are_called_by_the_judges_name(made: Project) -> None:
    with serve(first) as server:
        done = made.cli(
            "evaluate", "tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini}, size: {kind: longer}}")
        )
    assert done.status == 0, done.err
    rows = pq.read_table("runs/tiny/metrics.parquet").to_pylist()
    found = {row["metric"]: (row["value"], row["n"]) for row in rows if row["system"] == "cpo"}
    assert found["taste position bias"] == (1, 4), "it always takes the first"
    assert found["taste flip rate"] == (1, 4)
    assert found["taste tie"] == (1, 4)
    assert found["taste unparseable"] == (0, 4)
    assert {"size win rate", "size characters"} <= set(found)
    assert not {metric for metric in found if metric.startswith(("size position", "size flip", "size unparseable"))}


def test_models_that_judge_here(made: Project) -> None:
    judges = "{likely: {kind: likelihood, model: start}, letters: {kind: local, model: start, template: dolly}}"
    settings = ["--set", f"evaluate.judges={judges}", "--set", "evaluate.baseline=ground-truth"]
    # The tiny model's context of 128 tokens leaves the paper's template no room: no verdict, not an error
    done = made.cli("evaluate", "tiny.yaml", *settings)
    assert done.status == 0, done.err
    rows = pq.read_table("runs/tiny/metrics.parquet").to_pylist()
    found = {row["metric"]: row["value"] for row in rows if row["system"] == "cpo"}
    assert found["likely log-prob"] < 0
    assert found["letters unparseable"] == 1
    assert found["letters tie"] == 1
    assert made.cli("evaluate", "tiny.yaml", *settings, "--dry-run").out == "no judge of this recipe costs anything\n"


def test_what_failed_is_said_and_asked_again(made: Project) -> None:
    broken = True

    def script(seen: Seen) -> Reply:
        return error(500, "oops") if broken and crc32(seen.prompt.encode()) % 4 == 0 else written(seen, "A")

    judges = "{first: {kind: openai, api: mini}, second: {kind: openai, api: mini, template: wiki}}"
    with serve(script) as server:
        arguments = ["tiny.yaml", *options(server.url, judges, "apis.mini.attempts=1")]
        failed = made.cli("evaluate", *arguments)
        assert failed.status == 1
        assert "requests got no answer" in failed.error()
        kept = len(server.delivered)
        assert len(server.seen) == 2 * 2 * PAIRS > kept, "the second judge was asked, too"
        broken = False
        done = made.cli("evaluate", *arguments)
        assert done.status == 0, done.err
        assert len(server.seen) - 2 * 2 * PAIRS == 2 * 2 * PAIRS - kept, "what failed, and nothing else"


def test_outputs_that_are_not_there_count_as_the_longest(project: Project) -> None:
    assert project.cli("prepare", "tiny.yaml").status == 0
    with serve() as server:
        arguments = ["tiny.yaml", *options(server.url, "{taste: {kind: openai, api: mini, both_orders: false}}")]
        dry = project.cli("evaluate", *arguments, "--dry-run")
        assert dry.status == 0, dry.err
        assert server.seen == []
    head, _, *missing = dry.out.splitlines()
    assert head.startswith(f"judge taste (apis.mini): {PAIRS} calls to be made")
    assert missing == [
        f"{name}, greedy: 4 outputs are not there yet; each counts as 8 tokens, the most that it can have"
        for name in ("start", "cpo")
    ]
    assert not (project.root / "runs" / "tiny" / "metrics.parquet").exists()
