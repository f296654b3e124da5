"""Runs that are killed, interrupted or closed early: almost nothing is lost, and nothing is requested twice."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.pipeline.samples import SAMPLE_INDICES
from tests.support.api_run import Run, examples, expected
from tests.support.api_server import ApiServer, Reply, Seen, serve, written

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
    """Check that almost no answer was lost and that no recorded sample is requested again."""
    time.sleep(0.3)  # for requests in flight
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


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path: Path, tokenizer: TokenizerFiles) -> None:
    with serve() as server:
        server.script = lambda seen: slowly(server, seen)
        command = [sys.executable, "-c", COMMAND, str(tmp_path), server.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.delivered) < 30:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
        # Answers that wait to be recorded together are lost too; they are never more than the requests in flight.
        check_resumed(Run(tmp_path, tokenizer, server.url, concurrency=8), server, most_lost=16)


def test_an_interrupted_run_resumes(
    tmp_path: Path, tokenizer: TokenizerFiles, capfd: pytest.CaptureFixture[str]
) -> None:
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


def test_closing_early_does_not_wait_for_answers(
    tmp_path: Path, tokenizer: TokenizerFiles, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(lambda seen: Reply(written(seen).body, after=0.02 if seen.prompt == "p0" else 20)) as server:
        run = Run(tmp_path, tokenizer, server.url, concurrency=4)
        indices = pa.array([[0]] * 9, pa.list_(pa.int32()))
        made = run.work.open()(examples(9).append_column(SAMPLE_INDICES, indices))
        start = time.monotonic()
        assert next(iter(made)).units == 1
        del made
        gc.collect()
        assert time.monotonic() - start < 15, "it did not wait for answers"
    assert "destroyed" not in caplog.text
