from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.eval.generate import Outputs
from cpo_pipe.eval.judges.base import AB, Judgement, Verdict, Winner
from cpo_pipe.eval.metrics.differences import COMPARISONS, win_differences
from cpo_pipe.eval.metrics.figures import Figures
from cpo_pipe.eval.metrics.wins import measure_wins
from cpo_pipe.eval.statistics.bootstrap import Bootstrap
from cpo_pipe.eval.statistics.significance import holm, sign_flip_p

N = 200
WINNERS: tuple[Winner, ...] = ("a", "tie", "b")
OUTCOMES = {"a": 1.0, "tie": 0.5, "b": 0.0}
BASELINE = Outputs(["x" * 100] * N, [[1]] * N)


def winners(seed: int, shares: tuple[float, float, float]) -> list[Winner]:
    return [WINNERS[place] for place in np.random.default_rng(seed).choice(3, size=N, p=shares)]


def measure(
    contests: dict[tuple[str, str], list[Winner]], longer: int = 0, same: dict[str, str] | None = None
) -> tuple[pa.Table, pa.Table]:
    """Metrics and comparisons of systems that win so against the baseline, by system and decoding.

    All are `longer` than it on average. `same`: the fingerprint of systems that share one.
    """
    figures = Figures([f"e{n}" for n in range(N)], Bootstrap(resamples=500, seed=0))
    lengths = 100 + longer + np.random.default_rng(0).integers(-40, 41, N)
    outputs = Outputs(["x" * length for length in lengths.tolist()], [[1]] * N)
    for (system, decoding), won in contests.items():
        found = [Judgement({AB: Verdict(winner, None, {})}) for winner in won]
        measure_wins(figures, "judge", found, system, decoding, outputs, BASELINE)
    own = {system: system for system in ["base", *(system for system, _ in contests)]}
    decodings = dict.fromkeys(decoding for _, decoding in contests)
    rows = win_differences(figures, "judge", decodings, "base", own | (same or {}))
    return figures.metrics(), pa.Table.from_pylist(rows, schema=COMPARISONS)


GOOD, FAIR = winners(1, (0.6, 0.2, 0.2)), winners(2, (0.4, 0.2, 0.4))


def test_every_two_systems_are_compared_and_the_baseline_ties_with_itself() -> None:
    table = measure({("good", "greedy"): GOOD, ("fair", "greedy"): FAIR})[1]
    assert table.schema.equals(COMPARISONS)
    rows = {(row["system_a"], row["system_b"]): row for row in table.to_pylist()}
    assert list(rows) == [("good", "fair"), ("good", "base"), ("fair", "base")]
    good, fair = (np.array([OUTCOMES[winner] for winner in won]) for won in (GOOD, FAIR))
    for pair, differences in zip(rows, (good - fair, good - 0.5, fair - 0.5), strict=True):
        row = rows[pair]
        assert row["difference"] == pytest.approx(differences.mean())
        assert row["ci_low"] < differences.mean() < row["ci_high"]
        assert row["p"] == pytest.approx(sign_flip_p(differences))
        assert row["n_needed"] == np.ceil(7.8489 * differences.var() / 0.05**2)
        assert (row["metric"], row["decoding"], row["n"]) == ("judge win rate", "greedy", N)
    p_values = [row["p"] for row in rows.values()]
    assert [row["p_holm"] for row in rows.values()] == pytest.approx(holm(p_values))
    assert rows["good", "base"]["p_holm"] < 0.001 < 0.05 < rows["fair", "base"]["p_holm"]


def test_all_decodings_of_a_judge_are_adjusted_together() -> None:
    one = measure({("good", "greedy"): FAIR})[1].to_pylist()
    two = measure({("good", "greedy"): FAIR, ("good", "top-k"): winners(3, (0.4, 0.2, 0.4))})[1].to_pylist()
    assert [row["decoding"] for row in two] == ["greedy", "top-k"]  # never across decodings
    assert one[0]["p_holm"] == one[0]["p"]
    assert two[0]["p"] == one[0]["p"]
    assert [row["p_holm"] for row in two] == pytest.approx(holm([row["p"] for row in two]))


def rates(measured: tuple[pa.Table, pa.Table], metric: str) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in measured[0].to_pylist() if row["metric"] == metric}


def test_the_win_rate_at_equal_length_stands_beside_the_raw_one() -> None:
    measured = measure({("good", "greedy"): GOOD, ("fair", "greedy"): FAIR})
    raw, controlled = rates(measured, "judge win rate"), rates(measured, "judge length-controlled win rate")
    # These judgements know nothing of lengths.
    for system in ("good", "fair"):
        assert controlled[system]["value"] == pytest.approx(raw[system]["value"], abs=0.03)
        assert controlled[system]["ci_low"] < raw[system]["value"] < controlled[system]["ci_high"]


def test_where_few_are_won_there_is_no_rate_at_equal_length() -> None:
    measured = measure({("bad", "greedy"): [*["a"] * 5, *["b"] * (N - 5)]})
    assert "bad" in rates(measured, "judge win rate")
    assert not rates(measured, "judge length-controlled win rate")


@pytest.mark.slow
def test_one_model_under_two_names_is_compared_once() -> None:
    contests = {
        ("good", "greedy"): GOOD,
        ("fair", "greedy"): FAIR,
        ("mix@1", "greedy"): GOOD,
        ("mix@0", "greedy"): FAIR,
    }
    same = {"mix@1": "good", "mix@0": "base"}
    found = measure(contests, same=same)[1].to_pylist()
    assert [(row["system_a"], row["system_b"]) for row in found] == [
        ("good", "fair"),
        ("good", "base"),
        ("fair", "base"),
    ]
    without = {of: won for of, won in contests.items() if "@" not in of[0]}
    assert found == measure(without)[1].to_pylist()
