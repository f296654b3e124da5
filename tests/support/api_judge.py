"""A judge that asks an API, and what it judges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpo_pipe.data.store import Rows, Store
from cpo_pipe.eval.judges.base import Case, Judgement, Pair
from cpo_pipe.eval.judges.openai import OpenAiJudge
from cpo_pipe.eval.judges.query import Query
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from tests.support.verdicts import judged


def api(url: str, **config: Any) -> ApiModel:
    return ApiModel("gpt", Api.model_validate({"url": url, "model": "m", **config}))


class Bench:
    """A judge and its verdicts in a store."""

    def __init__(
        self,
        root: Path,
        url: str,
        template: str = "dolly",
        both_orders: bool = True,
        max_tokens: int = 16,
        temperature: float | None = 0,
        **config: Any,
    ):
        self.judge = OpenAiJudge("gpt", api(url, **config), Query(template), both_orders, max_tokens, temperature)
        self.rows: Rows = Store(root).rows("verdicts", self.judge.spec())

    def __call__(self, pairs: Sequence[Pair]) -> list[Judgement]:
        return judged(self.judge, pairs, self.rows)


def pairs(count: int) -> list[Pair]:
    return [Pair(Case(f"e{k}", f"prompt {k}", "", ""), f"good {k}", f"bad {k}") for k in range(count)]
