"""The data of a report."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cpo_pipe.eval.config import Published
from cpo_pipe.eval.judges.base import ScoreMetric
from cpo_pipe.eval.report.leaderboard import Leaderboard
from cpo_pipe.eval.report.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """Time and cost of a stage."""

    name: str
    seconds: float
    """Of its last run, reuse included."""
    total_seconds: float
    """Of all runs of this folder."""
    spent: str
    """Tokens and price of the APIs it asked; empty without any."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report shows."""

    identity: str
    """Hash of everything that decides the report."""
    run: str
    created: str
    """Date and time, as shown."""
    versions: Mapping[str, str]
    recipe: str
    """The resolved recipe, as YAML."""
    artifacts: Mapping[str, str]
    """Artifacts in the store, by what they hold."""
    baseline: str
    verdict: Verdict | None = None
    leaderboards: Sequence[Leaderboard] = ()
    """The ranked tables; the first is of the decoding that ranks."""
    metrics: pa.Table
    """METRICS schema."""
    comparisons: pa.Table
    """COMPARISONS schema."""
    agreements: pa.Table
    """AGREEMENT schema."""
    shared_metrics: AbstractSet[str]
    """Metrics of the embedding model that also ranked the negatives."""
    score_metrics: Sequence[ScoreMetric] = ()
    """The metrics of the judges' scores."""
    notes: Sequence[str]
    examples: pa.Table
    """The evaluated examples, in order (EXAMPLES schema)."""
    outputs: pa.Table
    """`example_id`, `system`, `decoding`, `text`."""
    scores: pa.Table | None = None
    """The values per example (VALUES schema) of one metric, by which examples can be sorted."""
    verdicts: pa.Table
    """How each output was judged (VERDICTS schema)."""
    published: Sequence[Published] = ()
    """Published results."""
    ensembles: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)
    """α and system of each ensemble's members, by its name, by rising α."""
    stages: Sequence[StageRecord] = ()
    trainings: Mapping[str, pa.Table] = field(default_factory=dict)
    """Step metrics, by training; the report draws the columns of `charts.CURVES`."""
    training_warnings: Sequence[str] = ()
    """What the monitors of the trainings warned of."""
    leakage: Sequence[Mapping[str, Any]] = ()
    """Overlap of held-out examples with training examples (rows of LEAKAGE)."""
    quality: pa.Table | None = None
    """Quality of the negatives: a row per strategy, then `all` and `target`."""
    quality_notes: Sequence[str] = ()
    """Problems of the negatives, and what could not be measured."""
    group_examples: pa.Table | None = None
    """The examples of `groups` (EXAMPLES schema)."""
    groups: pa.Table | None = None
    """Some groups to show (GROUPS schema)."""
