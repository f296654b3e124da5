"""Errors of an API: transient ones are retried, permanent ones end the run, and no sample is lost or invented."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from tests.support.api_run import Run, examples, expected
from tests.support.api_server import Reply, Seen, error, serve, written

SECRET = "sk-5ecret-0f-mine"


def test_unsupported_parameters_are_replaced_or_dropped(
    tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture
) -> None:
    def script(seen: Seen) -> Reply:
        if "max_tokens" in seen.body:
            return error(
                400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "unsupported"
            )
        if "seed" in seen.body:
            return Reply({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, 422)
        return written(seen)

    table = examples(20)
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=2)
        run.make(table)
        assert [row["text"] for row in run.made(table)] == expected(20)
        assert len(server.seen) <= 20 + 2 * 2, "the client remembers"
        assert server.seen[-1].body["max_completion_tokens"] == 60
        assert "the server takes no seed" in caplog.text


def test_transient_errors_lose_no_sample(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    def lacking(seen: Seen, **changes: Any) -> Reply:
        reply = written(seen)
        reply.body["choices"][0] |= changes
        return reply

    replies: Mapping[str, Any] = {
        "p0": lambda seen: error(429, "slow down", Retry_After="0"),
        "p1": lambda seen: error(500, "oops"),
        "p2": lambda seen: error(503, "busy", Retry_After="0"),
        "p3": lambda seen: Reply(b'{"choices": [{"message": {"content": "hal'),
        "p4": lambda seen: Reply(written(seen).body, cut=True),
        "p5": lambda seen: Reply(written(seen).body, after=0.6),
        "p6": lambda seen: Reply({"choices": []}),
        "p7": lambda seen: Reply({"error": "none"}),
        "p8": lambda seen: lacking(seen, message={"content": None}),
        "p9": lambda seen: lacking(seen, finish_reason="error"),
        "p10": lambda seen: lacking(seen, finish_reason="tool_calls", message={"content": None, "tool_calls": []}),
        "p11": lambda seen: Reply(b"<html>maintenance</html>", headers={"Content-Type": "text/html"}),
        "p12": lambda seen: lacking(seen, message={"content": ["parts"]}),
        "p13": lambda seen: Reply(b'{"choices": [{"finish_reason": "stop", "message": {"content": "\\ud800"}}]}'),
        "p14": lambda seen: error(408, "late"),
        "p15": lambda seen: Reply(b"", status=502),
        "p16": lambda seen: Reply(b"null"),
        "p17": lambda seen: Reply(b"\xff\xfe"),
        "p18": lambda seen: Reply({"choices": None}),
        "p19": lambda seen: Reply({"error": {"message": "Provider returned error", "code": 502}}),
        "p20": lambda seen: Reply({"error": {"message": "Rate limit exceeded", "code": 429}, "choices": None}),
        "p21": lambda seen: lacking(seen, error={"message": "cut off", "code": 504}),
        "p22": lambda seen: lacking(seen, finish_reason="insufficient_system_resource"),
    }
    table = examples(40)
    with serve(lambda seen: replies[seen.prompt](seen) if seen.prompt in replies and seen.attempt < 2 else
               written(seen)) as server:  # fmt: skip
        run = Run(tmp_path, tokenizer, server.url, timeout=0.3, attempts=3)
        run.make(table)
        assert run.texts(table) == expected(40)
        assert not run.refusals(table)
        assert server.prompts() == Counter({f"p{k}": 3 if f"p{k}" in replies else 1 for k in range(40)})


def test_a_request_that_fails_does_not_stop_the_others(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(30)
    with serve(lambda seen: error(500, "p7 is too much") if seen.prompt == "p7" else written(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=4, attempts=3)
        run.make(table)
        assert run.texts(table) == [text for text in expected(30) if text != "re p7"]
        assert not run.refusals(table)
        assert server.prompts()["p7"] == 3
        with pytest.raises(RunError) as caught:
            run.api.check_answered()
        assert str(caught.value) == (
            "apis.gpt: 1 requests got no answer, each sent 3 times or more (the last: HTTP 500: p7 is too much); "
            "completed work is kept; run the same command again"
        )
        assert run.make(table) == 1, "it is requested again"


def test_errors_of_an_upstream_provider_are_reported(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    metadata = {"raw": "free-models-per-day", "headers": {"Retry-After": "1"}}
    body = {"error": {"message": "Provider returned error", "code": 429, "metadata": metadata}}
    with serve(lambda seen: written(seen) if seen.attempt else Reply(body)) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(examples(1))
        first, second = server.seen
        assert 1 < second.at - first.at < 10
    with serve(lambda seen: Reply({"error": body["error"] | {"metadata": {"raw": "too\x1b[2J hot\x9b"}}})) as server:
        run = Run(tmp_path / "other", tokenizer, server.url, concurrency=1)
        with pytest.raises(RunError) as caught:
            run.make(examples(1))
        assert r"(last error: error 429: Provider returned error: too\x1b[2J hot\x9b)" in str(caught.value)


INVALID_ANSWERS = [
    (b"<html><head><title>502\n Bad gateway</title></head><body>x</body></html>", "the answer is not JSON but 502 Bad "
     "gateway"),
    (b'{"choices": [{"message"', 'the answer is not JSON but {"choices": [{"message"'),
    (b"", "the answer is not JSON but OK"),
    (b'{"choices": "none"}', "unexpected form of the answer: choices: Input should be a valid array"),
    (b'{"choices": null}', "the answer has 0 choices, not 1"),
    (b'{"detail": "Not\\u001b[2J ready"}', r"error: Not\x1b[2J ready"),
    (b'{"error": {"code": 502}}', 'error 502: {"error": {"code": 502}}'),
    (b'[{"error": {"code": 502}}]', "unexpected form of the answer: Input should be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "said"), INVALID_ANSWERS, ids=map(str, range(len(INVALID_ANSWERS))))
def test_an_invalid_answer_is_quoted_in_the_error(
    body: bytes, said: str, tmp_path: Path, tokenizer: TokenizerFiles
) -> None:
    with serve(lambda seen: Reply(body) if seen.prompt == "p0" else written(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url, attempts=2)
        run.make(examples(6))
        assert server.prompts()["p0"] == 2
        with pytest.raises(RunError) as caught:
            run.api.check_answered()
        assert f"(the last: {said})" in str(caught.value)


def test_refused_samples_are_not_requested_again(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    def refusing(seen: Seen) -> Reply:
        reply = written(seen, finish_reason="stop")
        reply.body["choices"][0]["message"] = {"content": None, "refusal": "I'm sorry"}
        return reply

    replies: Mapping[str, Any] = {
        "p1": lambda seen: written(seen, "cut off", "content_filter"),
        "p2": refusing,
        "p3": lambda seen: error(400, "violates the policy", "content_filter"),
        "p4": lambda seen: error(400, "too many tokens", "context_length_exceeded"),
        "p5": lambda seen: error(400, "This model's maximum context length is 8 tokens. However, you requested 9"),
        "p6": lambda seen: written(seen, " ", "length"),
    }
    table = examples(9, target=" the dog")
    with serve(lambda seen: replies.get(seen.prompt, written)(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(table)
        assert run.texts(table) == ["re p0", "re p7", "re p8"]
        reasons = ["content filter", "refusal", "content filter", "too long", "too long", "empty"]
        assert [(row["source"], row["reason"]) for row in run.refusals(table)] == [("sample:0", r) for r in reasons]
        assert run.refusals(table)[1]["detail"] == "I'm sorry"
        assert run.make(table) == 0
        assert len(server.seen) == 9


FATAL = [
    (401, "bad", None, InputError, "apis.gpt.key: the server does not accept the key in MY_KEY; export a valid one"),
    (403, "no", None, InputError, "apis.gpt: the server rejects the request (HTTP 403: no); change the "
     "setting that it names"),
    (404, "gone", None, InputError, "apis.gpt: no model m at URL (gone); correct model or url, which often ends in "
     "/v1"),
    (400, "temperature must be 1", None, InputError, "apis.gpt: the server rejects the request (HTTP 400: "
     "temperature must be 1); change the setting that it names"),
    (429, "pay", "insufficient_quota", RunError, "apis.gpt: the account has no credit left (pay); completed work is "
     "kept; add credit and run the same command again"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "message", "code", "kind", "line"), FATAL, ids=[str(case[0]) for case in FATAL])
def test_a_permanent_error_ends_the_run_at_once(
    status: int, message: str, code: str | None, kind: type[Exception], line: str, tmp_path: Path,
    tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", SECRET)
    slow = lambda seen: Reply(written(seen).body, after=0.3)  # noqa: E731
    table = examples(60)
    with serve(lambda seen: error(status, message, code) if seen.prompt == "p2" else slow(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url, key="MY_KEY", concurrency=4)
        with pytest.raises(kind) as caught:
            run.make(table)
        assert str(caught.value).replace(server.url, "URL") == line
        assert len(server.seen) == 4
        assert run.texts(table) == ["re p0", "re p1", "re p3"], "requests in flight are kept"


def inside(status: int, message: str, code: str | None) -> Reply:
    """Return the same error inside an answer of status 200."""
    return Reply({"error": {"message": message, "code": code or status}})


@pytest.mark.parametrize(("status", "message", "code", "kind", "line"), FATAL, ids=[str(case[0]) for case in FATAL])
def test_a_permanent_error_inside_an_answer_ends_the_run(
    status: int, message: str, code: str | None, kind: type[Exception], line: str, tmp_path: Path,
    tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", SECRET)
    with serve(lambda seen: inside(status, message, code)) as server:
        run = Run(tmp_path, tokenizer, server.url, key="MY_KEY", concurrency=1)
        with pytest.raises(kind) as caught:
            run.make(examples(3))
        assert str(caught.value).replace(server.url, "URL") == line.replace("HTTP", "error")
        assert len(server.seen) == 1


def test_no_credit_left_inside_an_answer(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    with serve(lambda seen: inside(402, "pay", None)) as server:
        with pytest.raises(RunError, match=r"the account has no credit left \(pay\)"):
            Run(tmp_path, tokenizer, server.url, concurrency=1).make(examples(3))
        assert len(server.seen) == 1


def test_refusals_inside_an_answer(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    replies: Mapping[str, Any] = {
        "p0": lambda seen: Reply({"error": {"message": "no", "code": "content_filter"}}),
        "p1": lambda seen: Reply({"error": "This model's maximum context length is 8 tokens"}),
        "p2": lambda seen: written(seen, "cut off", "SAFETY"),
    }
    table = examples(4)
    with serve(lambda seen: replies.get(seen.prompt, written)(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(table)
        assert [row["reason"] for row in run.refusals(table)] == ["content filter", "too long", "content filter"]
        assert len(server.seen) == 4


def test_parameters_that_a_server_refuses_inside_an_answer(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with serve(lambda seen: inside(400, said, None) if "max_tokens" in seen.body else written(seen)) as server:
        Run(tmp_path, tokenizer, server.url).make(examples(1))
        assert [("max_tokens" in seen.body) for seen in server.seen] == [True, False]


def test_a_server_that_is_down_ends_the_run_soon(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(500)
    with serve() as server:
        url = server.url
    run = Run(tmp_path, tokenizer, url, concurrency=4, attempts=3)
    with pytest.raises(RunError, match=r"apis.gpt: the server stopped answering \(last error: no connection"):
        run.make(table)
    with serve(lambda seen: error(500, "down") if len(server.seen) > 20 else written(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=4, attempts=3)
        with pytest.raises(RunError, match=r"stopped answering \(last error: HTTP 500: down\)"):
            run.make(table)
        assert len(server.seen) <= 20 + 16 + 4
        assert len(run.made(table)) == len(server.delivered)
