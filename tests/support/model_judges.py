"""Judges that run a model here, and what they judge."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cpo_pipe.data.execution.base import LocalExecutor, Work
from cpo_pipe.data.fingerprint import tokenizer_fingerprint
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Store
from cpo_pipe.eval.judges.base import Case, Judgement, Pair
from cpo_pipe.eval.judges.likelihood import Likelihood, LikelihoodJudge
from cpo_pipe.eval.judges.local import LocalJudge
from cpo_pipe.eval.judges.query import Query
from tests.support.verdicts import judged

TEMPLATE = "{prompt}|{output_a}|{output_b}:"


class Bench:
    """A model with its tokenizer, a store for its log-probs, and an executor that records what is scored."""

    def __init__(self, root: Path, folder: Path):
        self.store = Store(root)
        self.model = locate_model(str(folder), self.store)
        self.tokenizer = TokenizerFiles(folder, tokenizer_fingerprint(folder, self.store.hash_file))
        self.scored: list[int] = []
        """Groups scored by each call."""
        self.groups: list[dict[str, Any]] = []
        """What was scored."""

    def run(self, work: Work, batches: Iterable[pa.Table], label: str, total: int) -> None:
        """Do the work here, as an executor that records what is scored."""
        self.scored.append(total)
        items = list(batches)
        self.groups += [group for item in items for group in item.to_pylist()]
        LocalExecutor().run(work, items, label, total)

    def likelihood(self, template: str = "plain", date: str | None = None) -> LikelihoodJudge:
        metric = Likelihood(kind="likelihood", model="m").score_metric("likelihood")
        return LikelihoodJudge("likelihood", metric, self.model, self.tokenizer, template, self.store, self, date)

    def local(
        self,
        template: str = TEMPLATE,
        both_orders: bool = True,
        engine: str = "transformers",
        date: str | None = None,
    ) -> LocalJudge:
        parts = self.model, self.tokenizer
        return LocalJudge("local", *parts, Query(template), both_orders, engine, self.store, self, date)

    def judged(self, judge: LocalJudge | LikelihoodJudge, pairs: Sequence[Pair]) -> list[Judgement]:
        return judged(judge, pairs, self.store.rows("verdicts", judge.spec()))


def case(number: int) -> Case:
    return Case(f"e{number}", f"the fox {number}", f"say the fox {number}:", "target")
