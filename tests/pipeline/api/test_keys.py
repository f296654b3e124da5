"""The API key: what is said when it is missing or wrong, and that it is never written or logged."""

import pickle
from pathlib import Path

import pytest

from cpo_pipe.data.errors import InputError, RunError
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from tests.support.api_run import Run, examples
from tests.support.api_server import Reply, Seen, error, serve, written

SECRET = "sk-5ecret-0f-mine"


def test_a_missing_or_wrong_key_is_explained(
    tmp_path: Path, tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(seen: Seen) -> Reply:
        return written(seen) if seen.headers["authorization"] == f"Bearer {SECRET}" else error(401, "who are you?")

    table = examples(1)
    with serve() as server:
        Run(tmp_path, tokenizer, server.url).make(table)  # this server requires no key
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
def test_the_key_is_never_written_or_logged(
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
