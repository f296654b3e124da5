"""The collector of metrics: a value with its interval per system and decoding, and the values per example behind it."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cpo_pipe.data.schemas import METRICS
from cpo_pipe.eval.statistics.bootstrap import Bootstrap, Estimate, Values, share

ANY_DECODING = "-"
"""The decoding of metrics that do not depend on one."""

VALUES = pa.schema(
    [("example_id", pa.string()), ("system", pa.string()), ("decoding", pa.string()), ("metric", pa.string()),
     ("value", pa.float64())]
)  # fmt: skip


class Figures:
    """Collects metrics over one selection of examples."""

    def __init__(self, example_ids: Sequence[str], bootstrap: Bootstrap):
        self.example_ids = list(example_ids)
        self.bootstrap = bootstrap
        self._metrics: list[dict[str, Any]] = []
        self._values: list[pa.Table] = []

    def metrics(self) -> pa.Table:
        """Return the metrics (METRICS schema), in the order in which they were added."""
        return pa.Table.from_pylist(self._metrics, schema=METRICS)

    def values(self) -> pa.Table:
        """Return the values per example that the metrics average (VALUES schema)."""
        return pa.concat_tables([VALUES.empty_table(), *self._values])

    def values_of(self, decoding: str, metric: str) -> dict[str, Values]:
        """Return a metric's values per example, by system."""
        return {
            table["system"][0].as_py(): table["value"].to_numpy()
            for table in self._values
            if (table["decoding"][0].as_py(), table["metric"][0].as_py()) == (decoding, metric)
        }

    def add(self, system: str, decoding: str, metric: str, estimate: Estimate) -> None:
        """Add a metric."""
        self._metrics.append({"system": system, "decoding": decoding, "metric": metric, "value": estimate.value,
                              "ci_low": estimate.low, "ci_high": estimate.high, "n": estimate.n})  # fmt: skip

    def add_mean(self, system: str, decoding: str, metric: str, values: Sequence[float]) -> None:
        """Add the mean of a value per example, with its bootstrap interval."""
        self.add(system, decoding, metric, self.bootstrap.mean(values))
        self.keep(system, decoding, metric, values)

    def add_share(self, system: str, decoding: str, metric: str, flags: Sequence[float]) -> None:
        """Add the share of examples whose flag is 1, with Wilson's interval."""
        self.add(system, decoding, metric, share(flags))
        self.keep(system, decoding, metric, flags)

    def add_value(self, system: str, decoding: str, metric: str, value: float) -> None:
        """Add a metric of all outputs together, which has no interval."""
        self.add(system, decoding, metric, Estimate(value, None, None, len(self.example_ids)))

    def keep(self, system: str, decoding: str, metric: str, values: Sequence[float]) -> None:
        """Keep a metric's values per example."""
        n = len(self.example_ids)
        columns = [self.example_ids, [system] * n, [decoding] * n, [metric] * n, [float(value) for value in values]]
        self._values.append(pa.table(dict(zip(VALUES.names, columns, strict=True)), schema=VALUES))
