"""Models behind servers that misbehave in every way there is: nothing lost, nothing made up, nothing beyond the cap."""

import gc
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.api import client, limits
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.samples import SAMPLE_INDICES, SampleRequest, make_missing
from tests.support.api_run import SAMPLING, Run, examples
from tests.support.api_server import ApiServer, Reply, Seen, error, serve, written
from tests.support.models import make_tokenizer
from tests.support.vllm import needs_vllm

SECRET = "sk-5ecret-0f-mine"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return TokenizerFiles(folder, "tiny")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(limits, "BACKOFF", 0.01)
    monkeypatch.setattr(limits, "LONGEST_BACKOFF", 0.1)
    monkeypatch.setattr(client, "_TOGETHER", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    caplog.set_level("INFO")


def expected(count: int, prefix: str = "p") -> list[str]:
    return [f"re {prefix}{k}" for k in range(count)]


# ── what is asked, and what becomes of it ────────────────────────────────────────────────────────────────────────


def test_a_chat_becomes_rows(tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture) -> None:
    table = examples(3, target="\n the dog")
    loaded = tokenizer.load()
    with serve(lambda seen: written(seen, f"\n re {seen.prompt} {seen.body['seed']}\n")) as server:
        run = Run(tmp_path, tokenizer, server.url, system="be brief")
        assert run.make(table, 2) == 6
        rows = run.made(table)
        assert [row["text"].rsplit(" ", 1)[0] for row in rows] == [f"\n re p{k}" for k in range(3) for _ in range(2)]
        assert [row["sample_index"] for row in rows] == [0, 1] * 3
        for row in rows:
            assert row["token_ids"] == [*loaded(row["text"], add_special_tokens=False)["input_ids"], 0]
            assert row["text"].endswith(f" {row['seed']}"), "the seed of the row is the one that was sent"
            assert (row["finish_reason"], row["logprob"], row["strategy"]) == ("stop", None, "pool")
            assert (row["generator"], row["engine"]) == (run.api.fingerprint, "API, served-1")
        seen = server.seen[0].body
        assert server.seen[0].path == "/v1/chat/completions"
        assert seen["messages"][0] == {"role": "system", "content": "be brief"}
        assert set(seen) == {"messages", "model", "temperature", "max_tokens", "seed"}
        assert len({request.body["seed"] for request in server.seen}) == 6
        assert max(request.body["seed"] for request in server.seen) < 1 << 31
        assert caplog.text.count("top_k 50 is not used") == 1
        assert "60 prompt tokens and 30 written by this command so far" in caplog.text
        assert run.make(table, 4) == 6, "two more of each"
        assert run.made(table)[:2] == rows[:2]
        assert (run.make(table, 4), len(server.seen)) == (0, 12)


def test_special_tokens_in_answers_are_text_but_for_an_eos_at_the_end(
    tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture
) -> None:
    table, loaded = examples(2), tokenizer.load()
    answers = {"p0": "a<|endoftext|>b", "p1": "a<|endoftext|>"}
    with serve(lambda seen: written(seen, answers[seen.prompt])) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(table)
        inside, ended = run.made(table)
    assert inside["text"] == "a<|endoftext|>b"
    assert inside["token_ids"] == [*loaded(inside["text"], split_special_tokens=True)["input_ids"], 0]
    assert inside["token_ids"].count(0) == 1
    assert (ended["text"], ended["token_ids"]) == ("a", [*loaded("a")["input_ids"], 0])
    assert "apis.gpt: 1 answers have special tokens in their text; they are text" in caplog.text


def test_completions_continue_the_rendered_prompt(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(2)
    with serve(lambda seen: written(seen, " fox  ")) as server:
        run = Run(tmp_path, tokenizer, server.url, endpoint="completions")
        run.make(table)
        assert sorted(seen.prompt for seen in server.seen) == ["<0>", "<1>"]
        assert server.seen[0].path == "/v1/completions"
        assert [row["text"] for row in run.made(table)] == [" fox  "] * 2


def test_long_answers_are_cut(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(2)
    texts = {"p0": "x" * 61, "p1": "x" * 59}
    with serve(lambda seen: written(seen, texts[seen.prompt], "stop" if seen.prompt == "p0" else "length")) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(table)
        long, short = run.made(table)
        assert (long["text"], long["finish_reason"], len(long["token_ids"])) == ("x" * 60, "length", 60)
        assert (short["text"], short["finish_reason"]) == ("x" * 59, "length")
        assert long["token_ids"][:59] == short["token_ids"], "no end token where the text did not end"


def test_parameters_that_a_server_does_not_take(
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


def test_what_identifies_a_model() -> None:
    def model(**changes: Any) -> ApiModel:
        return ApiModel("gpt", Api.model_validate({"url": "http://x/v1", "model": "m", **changes}))

    other = {
        "url": "http://y/v1",
        "model": "n",
        "revision": "2",
        "endpoint": "completions",
        "server": "vllm",
        "system": "s",
    }
    assert len({model(**{name: value}).fingerprint for name, value in other.items()} | {model().fingerprint}) == 7
    same: dict[str, Any] = {"url": "http://x/v1/", "key": "K", "concurrency": 3, "timeout": 1, "attempts": 2,
                            "input_price": 1, "output_price": 2, "max_usd": 3, "max_tokens": 4}  # fmt: skip
    assert model(**same).spec() == model().spec()
    assert model(server="vllm").obeyed(SAMPLING).top_k == 50
    assert model().obeyed(SAMPLING).top_k == 0
    assert pickle.loads(pickle.dumps(model())) == model()


def test_beam_search_is_refused() -> None:
    api = ApiModel("gpt", Api(url="http://x/v1", model="m", server="vllm"))
    with pytest.raises(InputError, match=r"^apis\.gpt: beams is 4, but an API has no beam search; remove the API"):
        api.obeyed(replace(SAMPLING, temperature=0, beams=4))


@pytest.mark.parametrize("server", ["openai", "vllm"])
def test_top_p_is_sent_where_it_is_on(tmp_path: Path, tokenizer: TokenizerFiles, server: str) -> None:
    def body(top_p: float, root: str) -> dict[str, Any]:
        with serve(written) as there:
            run = Run(tmp_path / root, tokenizer, there.url, replace(SAMPLING, top_p=top_p), server=server)
            assert run.api.obeyed(run.work.sampling).top_p == top_p
            run.make(examples(1))
            return there.seen[0].body

    assert body(0.9, "on")["top_p"] == 0.9
    # vLLM's server would put the one of its model's generation config there.
    assert body(1.0, "off").get("top_p") == (1.0 if server == "vllm" else None)


ENDS = ["stop", None, "", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls", "STOP", "<|im_end|>", "done"]
LIMITS = ["length", "max_tokens", "MAX_TOKENS", "model_length"]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_text_ends_unless_a_limit_cut_it(endpoint: str, tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    reasons: list[Any] = [*ENDS, *LIMITS]
    texts = {"p": "chat", "<": "completions"}

    def script(seen: Seen) -> Reply:
        assert texts[seen.prompt[0]] == endpoint
        return written(seen, "the fox", reasons[int(seen.prompt.strip("p<>"))])

    table, loaded = examples(len(reasons)), tokenizer.load()
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url, endpoint=endpoint)
        run.make(table)
        assert set(server.prompts().values()) == {1}, "a complete answer is paid for, and is not asked for again"
        ids = loaded("the fox")["input_ids"]
        assert [(row["text"], row["finish_reason"], row["token_ids"]) for row in run.made(table)] == [
            *[("the fox", "stop", [*ids, 0])] * len(ENDS),
            *[("the fox", "length", ids)] * len(LIMITS),
        ]


def test_token_ids_end_unless_a_limit_cut_them(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    ids = tokenizer.load()("the fox")["input_ids"]

    def script(seen: Seen) -> Reply:
        cut = seen.body["prompt"][0] == 2  # of the second example
        reply = written(seen, "the fox", "length" if cut else None)
        reply.body["choices"][0] |= {"token_ids": ids if cut else [*ids, 0], "logprobs": {"token_logprobs": None}}
        return reply

    table = examples(2)
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url, server="vllm", endpoint="completions")
        run.make(table)
        found = [(row["text"], row["finish_reason"], row["token_ids"], row["logprob"]) for row in run.made(table)]
        assert found == [("the fox", "stop", [*ids, 0], None), ("the fox", "length", ids, None)]
        assert len(server.seen) == 2


def test_texts_in_parts_and_beside_reasoning(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    def script(seen: Seen) -> Reply:
        message, reason = {
            "p0": ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "the"},
                                {"type": "text", "text": " fox"}]}, "stop"),
            "p1": ({"content": "the dog", "reasoning_content": "hm"}, "stop"),
            "p2": ({"content": None, "reasoning_content": "hm"}, "stop"),
            "p3": ({"content": None, "reasoning": "hm"}, "length"),
            "p4": ({"content": [{"type": "thinking", "thinking": []}]}, "stop"),
        }[seen.prompt]  # fmt: skip
        reply = written(seen, finish_reason=str(reason))
        reply.body["choices"][0] |= {"message": message, "index": None}
        return reply

    table = examples(5)
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(table)
        assert [row["text"] for row in run.made(table)] == ["the fox", "the dog"]
        nothing = "the answer has reasoning, but no text after it"
        assert [(row["reason"], row["detail"]) for row in run.refusals(table)] == [
            ("empty", nothing), ("empty", "the limit of tokens was reached before any text was written"),
            ("empty", nothing),
        ]  # fmt: skip
        assert len(server.seen) == 5


# ── trouble that passes ──────────────────────────────────────────────────────────────────────────────────────────


def test_trouble_that_passes_costs_nothing(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    def lacking(seen: Seen, **changes: Any) -> Reply:
        reply = written(seen)
        reply.body["choices"][0] |= changes
        return reply

    troubles: Mapping[str, Any] = {
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
    with serve(lambda seen: troubles[seen.prompt](seen) if seen.prompt in troubles and seen.attempt < 2 else
               written(seen)) as server:  # fmt: skip
        run = Run(tmp_path, tokenizer, server.url, timeout=0.3, attempts=3)
        run.make(table)
        assert run.texts(table) == expected(40)
        assert not run.refusals(table)
        assert server.prompts() == Counter({f"p{k}": 3 if f"p{k}" in troubles else 1 for k in range(40)})


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
        assert run.make(table) == 1, "it is asked for again"


def test_being_told_to_slow_down_is_no_failure(
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


@pytest.mark.parametrize("body", RATE_LIMITS, ids=map(str, range(len(RATE_LIMITS))))
def test_being_told_to_slow_down_inside_an_answer(
    body: dict[str, Any], tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(limits, "LONGEST_BACKOFF", 0.02)
    monkeypatch.setattr(client, "_SLOW_ROUNDS", 8)
    table = examples(3)
    with serve(lambda seen: Reply(body) if seen.attempt < 4 else written(seen)) as server:
        # Such answers cost nothing: each would be 322 tokens else, the most that a request may use.
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


def test_what_the_server_behind_a_server_says(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
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


ANSWERS_THAT_ARE_NONE = [
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


@pytest.mark.parametrize(("body", "said"), ANSWERS_THAT_ARE_NONE, ids=map(str, range(len(ANSWERS_THAT_ARE_NONE))))
def test_what_an_answer_says_that_is_none(body: bytes, said: str, tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    with serve(lambda seen: Reply(body) if seen.prompt == "p0" else written(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url, attempts=2)
        run.make(examples(6))
        assert server.prompts()["p0"] == 2
        with pytest.raises(RunError) as caught:
            run.api.check_answered()
        assert f"(the last: {said})" in str(caught.value)


PAUSES = [
    {"Retry_After": "1"},
    {"Retry_After_ms": "1000"},
    {"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "1s"},
]


@pytest.mark.parametrize("headers", PAUSES)
def test_a_pause_is_meant_for_all(headers: dict[str, str], tmp_path: Path, tokenizer: TokenizerFiles) -> None:
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


def test_no_more_requests_are_under_way_than_allowed(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(30)
    with serve(lambda seen: Reply(written(seen).body, after=0.05)) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=5)
        run.make(table, 2)
        assert len(server.seen) == 60
        assert server.most_under_way == 5
        assert len(run.rows.files()) < 30, "answers are recorded together"


# ── trouble that stays ───────────────────────────────────────────────────────────────────────────────────────────


def test_refused_samples_are_not_asked_for_again(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    def refusing(seen: Seen) -> Reply:
        reply = written(seen, finish_reason="stop")
        reply.body["choices"][0]["message"] = {"content": None, "refusal": "I'm sorry"}
        return reply

    troubles: Mapping[str, Any] = {
        "p1": lambda seen: written(seen, "cut off", "content_filter"),
        "p2": refusing,
        "p3": lambda seen: error(400, "violates the policy", "content_filter"),
        "p4": lambda seen: error(400, "too many tokens", "context_length_exceeded"),
        "p5": lambda seen: error(400, "This model's maximum context length is 8 tokens. However, you requested 9"),
        "p6": lambda seen: written(seen, " ", "length"),
    }
    table = examples(9, target=" the dog")
    with serve(lambda seen: troubles.get(seen.prompt, written)(seen)) as server:
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
def test_what_no_repetition_helps_ends_the_run_at_once(
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
        assert run.texts(table) == ["re p0", "re p1", "re p3"], "what was under way is kept"


def inside(status: int, message: str, code: str | None) -> Reply:
    """The same error inside an answer of status 200."""
    return Reply({"error": {"message": message, "code": code or status}})


@pytest.mark.parametrize(("status", "message", "code", "kind", "line"), FATAL, ids=[str(case[0]) for case in FATAL])
def test_what_no_repetition_helps_inside_an_answer(
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
    troubles: Mapping[str, Any] = {
        "p0": lambda seen: Reply({"error": {"message": "no", "code": "content_filter"}}),
        "p1": lambda seen: Reply({"error": "This model's maximum context length is 8 tokens"}),
        "p2": lambda seen: written(seen, "cut off", "SAFETY"),
    }
    table = examples(4)
    with serve(lambda seen: troubles.get(seen.prompt, written)(seen)) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(table)
        assert [row["reason"] for row in run.refusals(table)] == ["content filter", "too long", "content filter"]
        assert len(server.seen) == 4


def test_parameters_that_a_server_refuses_inside_an_answer(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with serve(lambda seen: inside(400, said, None) if "max_tokens" in seen.body else written(seen)) as server:
        Run(tmp_path, tokenizer, server.url).make(examples(1))
        assert [("max_tokens" in seen.body) for seen in server.seen] == [True, False]


def test_keys(tmp_path: Path, tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(seen: Seen) -> Reply:
        return written(seen) if seen.headers["authorization"] == f"Bearer {SECRET}" else error(401, "who are you?")

    table = examples(1)
    with serve() as server:
        Run(tmp_path, tokenizer, server.url).make(table)  # a server that wants none needs none
    with serve(script) as server:
        run = Run(tmp_path / "other", tokenizer, server.url)
        with pytest.raises(
            InputError, match=r"apis.gpt.key: the server requires a key, but .* OPENAI_API_KEY is not set"
        ):
            run.make(table)
        named = Run(tmp_path / "other", tokenizer, server.url, key="MY_KEY")
        asked = len(server.seen)
        with pytest.raises(InputError, match=r"apis.gpt.key: the environment variable MY_KEY is not set; export it"):
            named.make(table)
        assert len(server.seen) == asked
        monkeypatch.setenv("MY_KEY", f"{SECRET} {SECRET}")
        with pytest.raises(InputError, match="MY_KEY holds spaces") as caught:
            named.make(table)
        assert SECRET not in str(caught.value)
        monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
        assert named.make(table) == 1


@pytest.mark.parametrize("status", [401, 400, 500, 200])
def test_the_key_stays_where_it_is(
    status: int, tmp_path: Path, tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import traceback

    def script(seen: Seen) -> Reply:
        if status == 200:
            return Reply({"choices": seen.headers["authorization"]})
        return error(status, f"you sent {seen.headers['authorization']}", seen.headers["authorization"])

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    caplog.set_level("DEBUG", "cpo_pipe")
    shown = ""
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url, attempts=2, concurrency=1)
        try:
            run.make(examples(4))
        except (InputError, RunError):
            shown = traceback.format_exc()
        assert server.seen[0].headers["authorization"] == f"Bearer {SECRET}"
    assert shown
    written_files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in written_files
    assert SECRET not in f"{shown}{caplog.text}{capfd.readouterr()}{run.work!r}{run.api.spec()}"
    assert SECRET.encode() not in pickle.dumps(run.work)


def test_a_server_that_is_down_does_not_take_hours(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
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


# ── caps ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cap", "said"),
    [({"max_tokens": 3000}, "3,000 tokens"),
     ({"max_usd": 0.004, "input_price": 1, "output_price": 2}, "0.004 US dollars")],
)  # fmt: skip
def test_a_cap_holds(
    cap: dict[str, Any], said: str, tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture
) -> None:
    def script(seen: Seen) -> Reply:
        reply = written(seen, used=(20, 60))
        return Reply({**reply.body, "choices": []}) if seen.prompt == "p5" and not seen.attempt else reply

    table = examples(200)
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=8, **cap)
        with pytest.raises(RunError) as caught:
            run.make(table)
        tokens, one = server.tokens["total_tokens"], 4 + 256 + 60
        usd, one_usd = (server.tokens["prompt_tokens"] + 2 * server.tokens["completion_tokens"]) / 1e6, (one + 60) / 1e6
        if "max_tokens" in cap:
            assert 3000 - one < tokens <= 3000, "all of it but for what one request may use"
            spent = f"{tokens:,}"
        else:
            assert 0.004 - one_usd < usd <= 0.004
            spent = f"{usd:.4g}"
        made = len(run.made(table))
        assert made == len(server.delivered) - 1
        (name,) = {"max_tokens", "max_usd"} & set(cap)
        assert str(caught.value) == (
            f"apis.gpt: the cap of {said} is reached ({spent} spent, {made} samples made); completed work is kept; "
            f"raise apis.gpt.{name} and run the same command again"
        )
        again = Run(tmp_path, tokenizer, server.url, concurrency=8, **cap)  # a new command
        with pytest.raises(RunError, match="is reached"):
            again.make(table)
        assert len(again.made(table)) > made
        assert max(server.prompts().values()) == 2


def test_a_cap_holds_where_the_server_does_not_count(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(50)
    with serve(lambda seen: written(seen, used=None)) as server:
        run = Run(tmp_path, tokenizer, server.url, max_tokens=3190)
        with pytest.raises(RunError, match=r"\(3,1\d\d spent, 10 samples made\)"):
            run.make(table)
        assert len(server.seen) == 10, "each may have used 2 or 3 bytes, 256 of a template and 60 written"


# ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────

COMMAND = """\
import sys
from pathlib import Path
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from tests.support.api_run import Run, examples

class Plain:  # the real one takes seconds to import
    eos_token, eos_token_id, bos_token_id, unk_token_id = "</s>", 0, None, None
    all_special_tokens, all_special_ids, added_tokens_decoder = ["</s>"], [0], {}

    def __call__(self, texts, **options):
        return {"input_ids": [[1, 2]] * len(texts)}

TokenizerFiles.load = lambda self: Plain()
run = Run(Path(sys.argv[1]), TokenizerFiles(Path("."), "tiny"), sys.argv[2], concurrency=8)
run.make(examples(60))
"""


def slowly(server: ApiServer, seen: Seen) -> Reply:
    return Reply(written(seen).body, after=0.03 * (1 + len(server.seen) % 3))


def check_resumed(run: Run, server: ApiServer, most_lost: int) -> None:
    """That of what the server has answered next to nothing was lost, and nothing that is there is asked for again."""
    time.sleep(0.3)  # what is still under way
    table = examples(60)
    made = {row["example_id"] for row in run.made(table)}
    delivered = {f"e{int(seen.prompt[1:]):03d}" for seen in server.delivered}
    assert made <= delivered
    assert len(delivered - made) <= most_lost
    before = server.prompts()
    assert run.make(table) == 60 - len(made)
    assert run.texts(table) == expected(60)
    twice = [prompt for prompt, times in server.prompts().items() if times > before[prompt] > 0]
    assert not {f"e{int(prompt[1:]):03d}" for prompt in twice} & made


def test_killed(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    with serve() as server:
        server.script = lambda seen: slowly(server, seen)
        command = [sys.executable, "-c", COMMAND, str(tmp_path), server.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.delivered) < 30:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        # What waits to be recorded with others is lost, too; it never is more than may be under way.
        check_resumed(Run(tmp_path, tokenizer, server.url, concurrency=8), server, most_lost=16)


def test_interrupted(tmp_path: Path, tokenizer: TokenizerFiles, capfd: pytest.CaptureFixture[str]) -> None:
    with serve() as server:

        def script(seen: Seen) -> Reply:
            if len(server.seen) == 30:
                os.kill(os.getpid(), signal.SIGINT)
            return slowly(server, seen)

        server.script = script
        run = Run(tmp_path, tokenizer, server.url, concurrency=8)
        with pytest.raises(KeyboardInterrupt):
            run.make(examples(60))
        server.script = lambda seen: slowly(server, seen)
        check_resumed(run, server, most_lost=8)
    gc.collect()
    assert capfd.readouterr().err == ""


def test_closed_in_the_middle(tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture) -> None:
    with serve(lambda seen: Reply(written(seen).body, after=0.02 if seen.prompt == "p0" else 20)) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=4)
        indices = pa.array([[0]] * 9, pa.list_(pa.int32()))
        made = run.work.open()(examples(9).append_column(SAMPLE_INDICES, indices))
        start = time.monotonic()
        assert next(iter(made)).units == 1
        del made
        gc.collect()
        assert time.monotonic() - start < 15, "it waited for no answer"
    assert "destroyed" not in caplog.text


def test_without_the_extra(tmp_path: Path, tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    with pytest.raises(
        InputError, match=r"apis.gpt: its client is not installed; run pip install 'cpo-pipe\[openai\]'"
    ):
        Run(tmp_path, tokenizer, "http://127.0.0.1:1/v1").make(examples(1))


# ── the real thing ───────────────────────────────────────────────────────────────────────────────────────────────


class TestVllm:
    pytestmark = needs_vllm

    def test_completions_are_those_of_the_engine_here(
        self, vllm_server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cpo_pipe.data.models.end_tokens import end_tokens
        from cpo_pipe.data.models.locate import locate_model
        from cpo_pipe.pipeline.samples import EngineWork, LazyEngine

        folder, url = vllm_server
        tokenizer, table = TokenizerFiles(folder, "tiny"), examples(8)
        sampling = Sampling(temperature=1.0, top_k=50, max_new_tokens=20, stop_ids=())
        run = Run(tmp_path, tokenizer, url, sampling, server="vllm", endpoint="completions", concurrency=3)
        assert run.make(table, 5) == 40
        model = locate_model(str(folder), Store(tmp_path / "models"))
        here = Store(tmp_path / "here").rows("negatives", {})
        ends = replace(sampling, stop_ids=end_tokens(model.path, tokenizer))
        work = EngineWork(here, LazyEngine("vllm", model), ends, 3, tokenizer, run.work.columns)
        make_missing(SampleRequest(here, 5), table, work, LocalExecutor(), batch_size=64, label="here")
        rows, theirs = run.made(table), here.read(table["example_id"].to_pylist()).to_pylist()
        assert {row["finish_reason"] for row in rows} == {"stop", "length"}
        assert rows[0]["engine"].startswith("API, m, vllm")
        assert [row["logprob"] for row in rows] == pytest.approx([row["logprob"] for row in theirs], rel=1e-5)
        same = [{**row, "engine": None, "logprob": None} for row in rows]
        assert same == [{**row, "engine": None, "logprob": None} for row in theirs]

    def test_chat_and_what_the_server_refuses(self, vllm_server: tuple[Path, str], tmp_path: Path) -> None:
        folder, url = vllm_server
        tokenizer, table = TokenizerFiles(folder, "tiny"), examples(4)
        long = table.slice(3).to_pylist()[0] | {"prompt": "the quick brown fox " * 100}
        table = pa.concat_tables([table.slice(0, 3), pa.Table.from_pylist([long], schema=EXAMPLES)])
        sampling = Sampling(temperature=1.0, top_k=1, max_new_tokens=12, stop_ids=())
        run = Run(tmp_path, tokenizer, url, sampling, server="vllm")
        run.make(table, 3)
        texts = [row["text"] for row in run.made(table)]
        assert texts == [text for text in texts[::3] for _ in range(3)], "top-k 1 is greedy"
        assert len(set(texts)) == 3
        assert [(row["source"], row["reason"]) for row in run.refusals(table)] == [
            (f"sample:{k}", "too long") for k in range(3)
        ]
        plain = Run(tmp_path / "plain", tokenizer, url, endpoint="completions")
        assert plain.make(table, 2) == 8
        assert [row["logprob"] for row in plain.made(table)] == [None] * 8
        other = Run(tmp_path / "other", tokenizer, url, sampling, model="n")
        with pytest.raises(InputError, match="no model n at"):
            other.make(table)

    def test_a_server_with_another_tokenizer(self, vllm_server: tuple[Path, str], tmp_path: Path) -> None:
        folder, url = vllm_server
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        content = json.loads((other / "tokenizer.json").read_text())
        words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
        content["model"]["vocab"] = dict(zip(words, [0, *range(2, len(words)), 1], strict=True))
        (other / "tokenizer.json").write_text(json.dumps(content))
        run = Run(tmp_path, TokenizerFiles(other, "other"), url, server="vllm", endpoint="completions")
        with pytest.raises(InputError, match="the server's tokenizer is not that of the examples"):
            run.make(examples(3))
