"""Examples answered by an API, in a store."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.api.work import ApiWork, prompt_of
from cpo_pipe.pipeline.engines.base import Sampling
from cpo_pipe.pipeline.samples import SampleRequest, make_missing

SAMPLING = Sampling(temperature=1.0, top_k=50, max_new_tokens=60, stop_ids=())


def examples(count: int, target: str = "the dog") -> pa.Table:
    rows = [
        {"example_id": f"e{k:03d}", "split": "train", "prompt": f"p{k}", "rendered": f"<{k}>", "target": target,
         "prompt_ids": [1 + k % 200, 2], "target_ids": [1, 0], "ends": True, "category": None}
        for k in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def expected(count: int) -> list[str]:
    """Return the texts that the server writes for `examples(count)`, without their seeds."""
    return [f"re p{k}" for k in range(count)]


class Run:
    """An API's samples of some examples in a store."""

    def __init__(
        self,
        root: Path,
        tokenizer: TokenizerFiles,
        url: str,
        sampling: Sampling = SAMPLING,
        message: Callable[[Mapping[str, Any]], str] = prompt_of,
        **config: Any,
    ):
        self.api = ApiModel("gpt", Api.model_validate({"url": url, "model": "m", **config}))
        store = Store(root / "store")
        spec = {"api": "gpt"}
        self.rows, self.refused = store.rows("negatives", spec), store.rows("rejected", spec)
        columns = {"strategy": "pool", "generator": self.api.fingerprint}
        rendering = {"template": "plain"}
        self.work = ApiWork(self.rows, self.refused, self.api, sampling, 3, tokenizer, rendering, message, columns)

    def make(self, table: pa.Table, n: int = 1) -> int:
        """Make samples 0 … n − 1; returns how many were missing."""
        wanted = SampleRequest(self.rows, n, self.refused)
        return make_missing(wanted, table, self.work, LocalExecutor(), batch_size=1024, label="gpt")

    def made(self, table: pa.Table) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.rows.read(table["example_id"].to_pylist()).to_pylist()
        return rows

    def texts(self, table: pa.Table) -> list[str]:
        """Without the seed in them."""
        return [row["text"].strip().rsplit(" ", 1)[0] for row in self.made(table)]

    def refusals(self, table: pa.Table) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.refused.read(table["example_id"].to_pylist()).to_pylist()
        return rows
