"""Rate limits, requested pauses and concurrency."""

import re
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.pipeline.api import client, limits
from tests.support.api_run import Run, examples, expected
from tests.support.api_server import Reply, Seen, error, serve, written
from tests.support.marks import slow_except


def test_a_rate_limit_is_not_a_failed_attempt(
    tmp_path: Path, tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LONGEST_BACKOFF", 0.02)
    table = examples(5)
    with serve(lambda seen: error(429, "slow") if seen.attempt < 6 else written(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url, attempts=1, concurrency=2)
        run.make(table)
        assert run.texts(table) == expected(5)
    with serve(lambda seen: error(429, "slow")) as server:
        run = Run(tmp_path / "other", tokenizer, server.url, attempts=1, concurrency=2)
        with pytest.raises(RunError, match=r"stopped answering \(last error: HTTP 429: slow\)"):
            run.make(table)
        assert len(server.seen) in (40, 41)


RATE_LIMITS: list[dict[str, Any]] = [
    {"error": {"message": "slow", "code": 429}},
    {"error": {"message": "slow", "code": "429"}, "choices": None},
    {"error": {"message": "slow", "type": "rate_limit_error", "code": None}, "choices": []},
    {"error": "slow", "code": 429},
    {"choices": [{"index": 0, "message": None, "error": {"message": "slow", "code": 429}}]},
    {"object": "error", "message": "slow", "code": 429},
]


@pytest.mark.parametrize(
    "body", slow_except(RATE_LIMITS, RATE_LIMITS[0], RATE_LIMITS[4]), ids=map(str, range(len(RATE_LIMITS)))
)
def test_a_rate_limit_inside_an_answer(
    body: dict[str, Any], tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(limits, "LONGEST_BACKOFF", 0.02)
    monkeypatch.setattr(client, "_SLOW_ROUNDS", 8)
    table = examples(3)
    with serve(lambda seen: Reply(body) if seen.attempt < 4 else written(seen)) as server:
        # Such answers cost nothing; otherwise each would count as 322 tokens, the most that a request may use.
        free = {} if body.get("choices") else {"max_tokens": 400}
        run = Run(tmp_path, tokenizer, server.url, attempts=1, concurrency=1, **free)
        run.make(table)
        assert run.texts(table) == expected(3)
        assert re.search(r"apis.gpt: error (429|rate_limit_error): slow; retrying, slower", caplog.text)
    with serve(lambda seen: Reply(body)) as server:
        run = Run(tmp_path / "other", tokenizer, server.url, attempts=1, concurrency=2)
        with pytest.raises(RunError, match=r"stopped answering \(last error: error (429|rate_limit_error): slow\)"):
            run.make(table)
        assert len(server.seen) in (16, 17)


PAUSES = [
    {"Retry_After": "1"},
    {"Retry_After_ms": "1000"},
    {"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "1s"},
]


@pytest.mark.parametrize("headers", slow_except(PAUSES, PAUSES[0]))
def test_a_requested_pause_applies_to_all_requests(
    headers: dict[str, str], tmp_path: Path, tokenizer: TokenizerFiles
) -> None:
    def script(seen: Seen) -> Reply:
        reply = error(429, "slow", **headers) if "Retry_After" in str(headers) else written(seen)
        if seen.prompt == "p3" and not seen.attempt:
            reply.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
            return reply
        return Reply(written(seen).body, after=0.05)

    table = examples(12)
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=3)
        run.make(table)
        assert run.texts(table) == expected(12)
        told = next(seen.at for seen in server.seen if seen.prompt == "p3")
        later = [seen.at - told for seen in server.seen if seen.at > told + 0.2]
        assert len(later) >= 5
        assert min(later) > 0.95, later
        assert max(later) < 10


def test_concurrency_is_never_exceeded(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(30)
    with serve(lambda seen: Reply(written(seen).body, after=0.05)) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=5)
        run.make(table, 2)
        assert len(server.seen) == 60
        assert server.most_under_way == 5
        assert len(run.rows.files()) < 30, "answers are recorded together"
