"""Rows that an API's answers become: text, token ids, end of the text, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.models.tokenizer import TokenizerFiles
from tests.support.api_run import Run, examples
from tests.support.api_server import Reply, Seen, serve, written


def test_chat_answers_become_rows(tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture) -> None:
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
            assert row["text"].endswith(f" {row['seed']}"), "the row has the seed that was sent"
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


def test_special_tokens_in_answers_stay_text_except_a_final_eos(
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


def test_long_answers_are_truncated(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(2)
    texts = {"p0": "x" * 61, "p1": "x" * 59}
    with serve(lambda seen: written(seen, texts[seen.prompt], "stop" if seen.prompt == "p0" else "length")) as server:
        run = Run(tmp_path, tokenizer, server.url)
        run.make(table)
        long, short = run.made(table)
        assert (long["text"], long["finish_reason"], len(long["token_ids"])) == ("x" * 60, "length", 60)
        assert (short["text"], short["finish_reason"]) == ("x" * 59, "length")
        assert long["token_ids"][:59] == short["token_ids"], "no end token, because the text did not end"


ENDS = ["stop", None, "", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls", "STOP", "<|im_end|>", "done"]


LIMITS = ["length", "max_tokens", "MAX_TOKENS", "model_length"]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_text_ends_unless_a_limit_truncated_it(endpoint: str, tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    reasons: list[Any] = [*ENDS, *LIMITS]
    texts = {"p": "chat", "<": "completions"}

    def script(seen: Seen) -> Reply:
        assert texts[seen.prompt[0]] == endpoint
        return written(seen, "the fox", reasons[int(seen.prompt.strip("p<>"))])

    table, loaded = examples(len(reasons)), tokenizer.load()
    with serve(script) as server:
        run = Run(tmp_path, tokenizer, server.url, endpoint=endpoint)
        run.make(table)
        assert set(server.prompts().values()) == {1}, "a complete answer is paid for and not requested again"
        ids = loaded("the fox")["input_ids"]
        assert [(row["text"], row["finish_reason"], row["token_ids"]) for row in run.made(table)] == [
            *[("the fox", "stop", [*ids, 0])] * len(ENDS),
            *[("the fox", "length", ids)] * len(LIMITS),
        ]


def test_token_ids_end_unless_a_limit_truncated_them(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
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


def test_text_is_joined_from_parts_and_separated_from_reasoning(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
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
