"""The ranked table: which metrics it has, in which order the systems are, and what is marked."""

import pyarrow as pa

from cpo_pipe.data.schemas import METRICS
from cpo_pipe.eval.config import GROUND_TRUTH
from cpo_pipe.eval.metrics.differences import COMPARISONS
from cpo_pipe.eval.report.leaderboard import Cell, Leaderboard, leaderboards
from tests.support.report_data import figure


def boards(rows: list[dict], compared: list[dict] | None = None, by: str = "gpt win rate") -> list[Leaderboard]:
    metrics = pa.Table.from_pylist(rows, schema=METRICS)
    comparisons = pa.Table.from_pylist(compared or [], schema=COMPARISONS)
    return leaderboards(metrics, comparisons, "mle", (by, "top-k"))


def comparison(system: str, p_holm: float, decoding: str = "top-k", other: str = "mle") -> dict:
    return {"metric": "gpt win rate", "decoding": decoding, "system_a": system, "system_b": other, "p_holm": p_holm}


def of(board: Leaderboard, metric: str) -> dict[str, Cell]:
    (column,) = (column for column in board.columns if column.metric == metric)
    return dict(zip(board.systems, column.cells, strict=True))


ROWS = [
    figure(GROUND_TRUTH, "-", "rep-4", 0.1),
    *(figure(system, "-", "target NLL", nll) for system, nll in {"mle": 4.0, "bad": 3.0, "good": 5.0}.items()),
    *(figure(system, "greedy", "rep-4", share) for system, share in {"mle": 0.5, "bad": 0.0, "good": 0.19}.items()),
    *(figure(system, "top-k", "rep-4", share) for system, share in {"mle": 0.12, "bad": 0.0, "good": 0.3}.items()),
    *(figure(system, "greedy", "gpt win rate", rate) for system, rate in {"bad": 0.9, "good": 0.1}.items()),
    *(figure(system, "top-k", "gpt win rate", rate) for system, rate in {"bad": 0.4, "good": 0.6}.items()),
]


def test_the_best_is_first_the_baseline_at_one_half_and_the_ground_truth_last() -> None:
    first, second = boards(ROWS)
    assert (first.decoding, first.systems) == ("top-k", ["good", "mle", "bad", GROUND_TRUTH])
    assert (second.decoding, second.systems) == ("greedy", ["bad", "mle", "good", GROUND_TRUTH])


def test_the_best_value_depends_on_the_metric() -> None:
    first, second = boards(ROWS)
    best = {
        (board.decoding, column.metric): [s for s, cell in zip(board.systems, column.cells, strict=True) if cell.best]
        for board in (first, second)
        for column in board.columns
    }
    assert best == {
        ("top-k", "gpt win rate"): ["good"], ("top-k", "rep-4"): ["mle"], ("top-k", "target NLL"): ["bad"],
        ("greedy", "gpt win rate"): ["bad"], ("greedy", "rep-4"): ["good"], ("greedy", "target NLL"): ["bad"],
    }  # fmt: skip
    assert [column.direction for column in first.columns] == ["↑", "≈", "↓"]


def test_significant_differences_to_the_baseline_are_marked() -> None:
    first, second = boards(
        ROWS, [comparison("good", 0.04), comparison("bad", 0.05), comparison("bad", 0.01, other="x")]
    )
    assert {system: cell.significant for system, cell in of(first, "gpt win rate").items()} == {
        "good": True, "mle": False, "bad": False, GROUND_TRUTH: False,
    }  # fmt: skip
    assert not any(cell.significant for cell in of(second, "gpt win rate").values()), "of the other decoding"


def test_values_and_intervals_are_shown_in_the_metrics_unit() -> None:
    first, _ = boards(ROWS)
    good = of(first, "gpt win rate")["good"]
    assert (good.text, good.interval) == ("60%", "[50, 70]")
    nll = of(first, "target NLL")["good"]
    assert (nll.text, nll.interval) == ("5.000", "[4.900, 5.100]")
    assert of(first, "gpt win rate")["mle"] == Cell("–")


def test_at_most_six_metrics_and_those_that_rank_and_judge_first() -> None:
    rows = [
        *(figure("a", "top-k", name, 1.0) for name in ("chrF", "MAUVE", "distinct-2", "length", "one win rate",
          "two win rate", "two length-controlled win rate", "self-BLEU")),
        *ROWS,
    ]  # fmt: skip
    (names, *_) = ([column.metric for column in board.columns] for board in boards(rows, by="chrF"))
    assert names == ["chrF", "one win rate", "two win rate", "gpt win rate", "MAUVE", "rep-4"]
