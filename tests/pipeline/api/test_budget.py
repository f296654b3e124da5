"""Caps on tokens and on US dollars."""

from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import RunError
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from tests.support.api_run import Run, examples
from tests.support.api_server import Reply, Seen, serve, written


@pytest.mark.parametrize(
    ("cap", "said"),
    [({"max_tokens": 3000}, "3,000 tokens"),
     ({"max_usd": 0.004, "input_price": 1, "output_price": 2}, "0.004 US dollars")],
)  # fmt: skip
def test_a_cap_is_not_exceeded(
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
            assert 3000 - one < tokens <= 3000, "unused is less than one request may use"
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


def test_a_cap_is_not_exceeded_when_the_server_reports_no_usage(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    table = examples(50)
    with serve(lambda seen: written(seen, used=None)) as server:
        run = Run(tmp_path, tokenizer, server.url, max_tokens=3190)
        with pytest.raises(RunError, match=r"\(3,1\d\d spent, 10 samples made\)"):
            run.make(table)
        assert len(server.seen) == 10, "each may have used 2 or 3 bytes, 256 for the template and 60 written"
