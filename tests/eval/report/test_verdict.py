"""The answer: the best system against the baseline, decided or not, and its costs; by hand."""

from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.schemas import METRICS
from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.metrics.differences import COMPARISONS
from cpo_pipe.eval.report.verdict import Verdict, percent, verdict
from tests.support.report_data import figure


def row(system: str, difference: float, p: float, **changes: Any) -> dict[str, Any]:
    return {"metric": "gpt win rate", "decoding": "greedy", "system_a": system, "system_b": "mle", "p": p,
            "difference": difference, "ci_low": difference - 0.06, "ci_high": difference + 0.06, "p_holm": 1.0, "n": 9,
            "n_needed": 9, **changes}  # fmt: skip


METRIC_ROWS = [
    figure("mle", "-", "target NLL", 4.0), figure("cpo", "-", "target NLL", 4.25),
    figure("mle", "greedy", "length", 150), figure("cpo", "greedy", "length", 41),
    figure("cpo", "greedy", "gpt win rate", 0.6),
    figure("mix", "greedy", "gpt win rate", 0.55), figure("cpo", "top-k", "length", 7),
    figure("cpo", "greedy", "chrF", 20.0), figure("mle", "greedy", "chrF", 18.5),
]  # fmt: skip


def answer(*rows: dict[str, Any], baseline: str = "mle", metric: str = "gpt win rate") -> Verdict | None:
    metrics = pa.Table.from_pylist(METRIC_ROWS, schema=METRICS)
    return verdict(metrics, pa.Table.from_pylist(list(rows), schema=COMPARISONS), baseline, metric, "greedy")


def test_a_decided_gain() -> None:
    found = answer(row("mix", 0.05, 0.4), row("cpo", 0.1, 0.01))
    assert found is not None
    assert (found.system, found.systems, found.decided) == ("cpo", 2, True)
    assert found.p == pytest.approx(0.02), "Holm's adjustment for the two systems"
    assert found.sentence == (
        "cpo is better than mle: gpt win rate of cpo under greedy 60% against 50%, +10 [+4, +16], p = 0.020 "
        "adjusted for 2 systems; "
        "target NLL 4.25 against 4.00 nats per token, length 41.0 against 150 tokens."
    )


def test_a_gain_that_is_not_decided() -> None:
    found = answer(row("mix", 0.05, 0.4), row("cpo", 0.1, 0.026))
    assert found is not None
    assert not found.decided
    assert found.sentence.startswith(
        "Undecided: the best system, cpo, does not differ significantly from mle: gpt win "
    )
    assert "p = 0.052" in found.sentence


def test_all_others_are_worse() -> None:
    found = answer(row("mix", -0.2, 0.0001), row("cpo", -0.1, 0.0001))
    assert found is not None
    assert found.headline == "No system is better than mle; the best other one, cpo, is worse"
    assert "-10 [-16, -4], p < 0.001" in found.sentence


def test_what_makes_the_answer_doubtful_is_said() -> None:
    """A win rate by the ranker's embedding model, which is no gain at equal length."""
    metrics = pa.Table.from_pylist(
        [
            *METRIC_ROWS,
            figure("cpo", "greedy", "gpt length-controlled win rate", 0.52) | {"ci_low": 0.445, "ci_high": 0.6},
        ],
        schema=METRICS,
    )
    compared = pa.Table.from_pylist([row("cpo", 0.1, 0.01)], schema=COMPARISONS)
    found = verdict(metrics, compared, "mle", "gpt win rate", "greedy", {"gpt win rate"})
    assert found is not None
    assert found.sentence.endswith(
        "against 150 tokens. At equal length 52% [45, 60]. The embedding model of this metric also ranked the "
        "negatives, which favors what was trained on that ranking: look at the other metrics, too."
    )


def test_halves_of_a_percent_agree_with_each_other() -> None:
    assert [percent(share) for share in (0.645, 0.145, 0.5, 0.005, -0.145, 0.6449)] == [65, 15, 50, 1, -14, 64]


def test_another_metric_has_the_baselines_own_value() -> None:
    found = answer(row("cpo", 1.5, 0.0001, metric="chrF", ci_low=1.04, ci_high=1.96), metric="chrF")
    assert found is not None
    assert found.figures == "chrF of cpo under greedy 20.0 against 18.5, +1.5 [+1, +2], p < 0.001"


def test_other_pairs_decodings_and_metrics_are_no_answer() -> None:
    assert answer() is None
    assert answer(row("cpo", 0.1, 0.01, decoding="top-k"), row("cpo", 0.1, 0.01, system_b="mix"),
                  row("cpo", 0.1, 0.01, metric="api win rate")) is None  # fmt: skip


def test_against_the_ground_truth_there_are_no_costs() -> None:
    found = answer(row("cpo", 0.1, 0.01, system_b=GROUND_TRUTH), baseline=GROUND_TRUTH)
    assert found is not None
    assert found.costs == ()


def test_of_diversity_the_nearer_system_is_better() -> None:
    rows = [figure(name, "greedy", "distinct-2", value) for name, value in {"mle": 0.4, "cpo": 0.5}.items()]
    metrics = pa.Table.from_pylist([*rows, figure(GROUND_TRUTH, "-", "distinct-2", 0.62)], schema=METRICS)
    compared = pa.Table.from_pylist([row("cpo", 0.1, 0.001, metric="distinct-2")], schema=COMPARISONS)
    found = verdict(metrics, compared, "mle", "distinct-2", "greedy")
    assert found is not None
    assert found.sentence == (
        "cpo comes nearer to the ground truth than mle: distinct-2 of cpo under greedy 0.500 against 0.400, the ground "
        "truth has 0.620; nearer by +0.1 [+0.04, +0.16], p = 0.001."
    )
