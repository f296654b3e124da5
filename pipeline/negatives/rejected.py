"""Rejected answers of preference data as negatives."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.execution.base import Make, NewRows, Work
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.store import Rows
from cpo_pipe.pipeline.negatives.strategy import Inputs, Job, Strategy, negative
from cpo_pipe.pipeline.samples import SAMPLE_INDICES, refused_source


class Rejected(Strategy):
    """The rejected answers of preference data."""

    kind: ClassVar[str] = "rejected"

    count: int = Field(0, ge=0, lt=1 << 16, description="rejected answers per prompt (0: all)")

    def plan(self, inputs: Inputs) -> Job:
        """Plan to take the answers from the examples; those that have fewer than `count` get fewer.

        Raises:
            InputError: no example has a rejected answer, or so many.
        """
        examples, most = inputs.examples, inputs.examples.most_rejected
        if not most:
            raise InputError(
                f"{inputs.key}: the data has no rejected answers; name data with the columns chosen and rejected, or "
                "set negatives.sources to strategies that make negatives"
            )
        if self.count > most:
            raise InputError(f"{inputs.key}.count is {self.count}, but rows have at most {most} rejected answers; "
                             "lower it")  # fmt: skip
        spec: Spec = {"strategy": self.kind, "prompt": examples.rendering, "examples": examples.artifact.path.name}
        rows, refused = inputs.rows(spec), inputs.refused(spec)
        return Job(inputs.source(rows, self.count or most, refused), RejectedWork(rows, refused))


@dataclass(frozen=True)
class RejectedWork(Work):
    """Work that takes sample k of an example from its k-th rejected answer."""

    rows: Rows
    refused: Rows
    """Answers that the data does not have (REJECTED schema)."""

    def open(self) -> Make:
        """Return the function that makes rows; nothing is loaded."""
        return self._make

    def _make(self, batch: pa.Table) -> Iterator[NewRows]:
        rows, refused = [], []
        for example in batch.select(["example_id", "rejected", SAMPLE_INDICES]).to_pylist():
            answers = example["rejected"] or []
            for k in example[SAMPLE_INDICES]:
                if k < len(answers):
                    columns = {key: answers[k][key] for key in ("text", "token_ids", "ends")}
                    rows.append(negative(example, k, 0, strategy=Rejected.kind, **columns))
                else:
                    detail = f"the row has {len(answers)} rejected answers"
                    refused.append({"source": refused_source(k), "example_id": example["example_id"],
                                    "reason": "not in the data", "detail": detail})  # fmt: skip
        yield NewRows([refused, rows], len(rows) + len(refused))
