"""vLLM's own server."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.samples import SampleRequest, make_missing
from tests.support.api_run import Run, examples
from tests.support.vllm import needs_vllm


class TestVllm:
    pytestmark = needs_vllm

    def test_completions_equal_those_of_the_local_engine(
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

    def test_chat_and_refusals(self, vllm_server: tuple[Path, str], tmp_path: Path) -> None:
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
