"""The report's tables: figures, differences, agreement, quality of negatives, time and cost."""

from pathlib import Path

import pyarrow as pa

from cpo_pipe.eval.config import Published
from cpo_pipe.eval.metrics.differences import COMPARISONS
from cpo_pipe.eval.report.data import StageRecord
from cpo_pipe.eval.report.exports import write_exports
from cpo_pipe.eval.statistics.agreement import AGREEMENT
from tests.support.report_data import make_data, quality_table, strategy
from tests.support.report_page import render, row_of


def test_the_figures_are_shown_with_their_intervals(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "0.250 [0.150, 0.350]" in page.text
    assert "0.750 ± 0.015" in page.text
    assert "4.125 [4.025, 4.225]" in page.text
    assert "mle (baseline)" in page.text
    assert "a note" in page.text
    assert "MAUVE sd" not in page.text


def test_differences_between_systems_are_shown_judge_by_judge(tmp_path: Path) -> None:
    pair = {"metric": "similarity win rate", "decoding": "greedy", "system_a": "cpo", "system_b": "mle",
            "difference": 0.1, "ci_low": 0.0125, "ci_high": 0.2, "p": 0.02, "p_holm": 0.04, "n": 7,
            "n_needed": 1785}  # fmt: skip
    alone = pair | {"metric": "exact win rate", "difference": -0.25, "ci_low": None, "ci_high": None, "p": 1e-9}
    table = pa.Table.from_pylist([pair, alone], schema=COMPARISONS)
    _, page = render(tmp_path, make_data(comparisons=table))
    assert row_of(page, "cpo against mle, greedy") == "+0.100 [+0.013, +0.200]0.0200.0401,785"
    assert "-0.250< 0.0010.0401,785" in page.text
    similarity, exact = (
        page.text.index(f"\nDifferences in {name}\n") for name in ("similarity win rate †", "exact win rate")
    )
    assert similarity < page.text.index("+0.100") < exact < page.text.index("-0.250")
    _, page = render(tmp_path, make_data())
    assert "Differences" not in page.text


def test_the_agreement_of_judges_is_shown_and_exported(tmp_path: Path) -> None:
    row = {"judge_a": "gpt", "judge_b": "human annotations", "agreement": 0.8125, "ci_low": 0.7, "ci_high": 0.9,
           "kappa": 0.5, "kappa_low": 0.25, "kappa_high": 0.75, "n": 1600, "decided": 0.875, "n_decided": 1200,
           "ties_a": 0.05, "ties_b": 0.125}  # fmt: skip
    alike = row | {"judge_b": "longer", "kappa": None, "kappa_low": None, "kappa_high": None, "decided": None}
    data = make_data(agreements=pa.Table.from_pylist([row, alike], schema=AGREEMENT))
    _, page = render(tmp_path, data)
    assert row_of(page, "gpt and human annotations") == (
        "0.812 [0.700, 0.900]0.875 (1,200)5.0%, 12.5%0.500 [0.250, 0.750]1,600"
    )
    assert row_of(page, "gpt and longer") == "0.812 [0.700, 0.900]–5.0%, 12.5%–1,600"
    write_exports(tmp_path, data)
    assert (
        "| gpt and human annotations | 0.812 [0.700, 0.900] | 0.875 (1,200) | 5.0%, 12.5% | 0.500 [0.250, 0.750] |"
        in (tmp_path / "metrics.md").read_text()
    )
    _, page = render(tmp_path, make_data())
    assert "Agreement of judges" not in page.text


def test_published_figures_are_shown_beside_those_of_the_run(tmp_path: Path) -> None:
    data = make_data()
    row = next(row for row in data.metrics.to_pylist() if row["ci_low"] is not None)
    published = Published(source="A paper, table 1", metric=row["metric"], decoding=row["decoding"],
                          values={row["system"]: 0.471, "other": 0.5})  # fmt: skip
    _, page = render(tmp_path, make_data(published=[published]))
    assert f"A paper, table 1: {row['metric']}, {row['decoding']}" in page.text
    assert row_of(page, "other") == "0.500–"
    write_exports(tmp_path, make_data(published=[published]))
    text = (tmp_path / "metrics.md").read_text()
    shown = f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    assert f"| {row['system']} | 0.471 | {shown} |" in text
    _, page = render(tmp_path, make_data())
    assert "Published results" not in page.text


def test_metrics_that_use_the_rankers_model_are_marked(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "MAUVE †" in page.text
    assert "rep-4 †" not in page.text
    assert "† Measured with the embedding model that ranked" in page.text
    _, page = render(tmp_path, make_data(shared_metrics=frozenset(), leaderboards=()))
    assert "†" not in page.text


def test_the_quality_of_negatives_is_shown_with_its_reference_values(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert row_of(page, "made") == "1,2003"
    assert row_of(page, "copies of the target") == "25.0%–"
    assert row_of(page, "target is longest (chance)") == "62% (50%)–"
    assert row_of(page, "distinct-2 (the targets')") == "0.25 (0.50)0.50"
    assert row_of(page, "score, quantiles 10/50/90%") == "0.12/0.50/0.75–"
    assert "autoregressive: too short." in page.text
    assert "log-prob" not in page.text, "it was not measured"
    assert "share of those made that equal the target, token by token" in page.text
    assert "distinct 2-grams divided by all 2-grams of one negative per group; distinct 2-grams" in page.text


def test_several_strategies_are_also_shown_together(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "figureautoregressivetargets" in page.text
    several = quality_table(strategy("batch"), strategy("x", similarity_histogram=None, similarity_p50=None))
    _, page = render(tmp_path, make_data(quality=several))
    assert "figurebatchxalltargets" in page.text
    assert "Scores of the negatives in the ranking: batch 4 negatives, median 0.50. Shares" in page.text
    assert "relative to their targets: batch 4 negatives, median 0.75; x 4 negatives, median 0.75." in page.text


def test_time_and_cost_of_the_stages_are_shown(tmp_path: Path) -> None:
    stages = [
        StageRecord(name="prepare", seconds=0.25, total_seconds=59.4, spent=""),
        StageRecord(name="train cpo", seconds=61, total_seconds=7380, spent="mini: 12 prompt tokens"),
    ]
    _, page = render(tmp_path, make_data(stages=stages))
    assert row_of(page, "prepare") == "0 s59 s–"
    assert row_of(page, "train cpo") == "1 min 1 s2 h 3 minmini: 12 prompt tokens"
