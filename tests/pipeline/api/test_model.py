"""A model behind an API: its identity, the sampling settings it obeys, and the package it needs."""

import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from tests.support.api_run import SAMPLING, Run, examples
from tests.support.api_server import serve, written


def test_the_fingerprint_covers_what_changes_the_answers() -> None:
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
def test_top_p_is_sent_when_it_is_set(tmp_path: Path, tokenizer: TokenizerFiles, server: str) -> None:
    def body(top_p: float, root: str) -> dict[str, Any]:
        with serve(written) as there:
            run = Run(tmp_path / root, tokenizer, there.url, replace(SAMPLING, top_p=top_p), server=server)
            assert run.api.obeyed(run.work.sampling).top_p == top_p
            run.make(examples(1))
            return there.seen[0].body

    assert body(0.9, "on")["top_p"] == 0.9
    # Without one, vLLM's server uses the top_p of its model's generation config.
    assert body(1.0, "off").get("top_p") == (1.0 if server == "vllm" else None)


def test_a_missing_client_package_is_explained(
    tmp_path: Path, tokenizer: TokenizerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    with pytest.raises(
        InputError, match=r"apis.gpt: its client is not installed; run pip install 'cpo-pipe\[openai\]'"
    ):
        Run(tmp_path, tokenizer, "http://127.0.0.1:1/v1").make(examples(1))
