"""The report's charts and their descriptions in words."""

from pathlib import Path

import pyarrow as pa

from cpo_pipe.data.schemas import METRICS
from cpo_pipe.eval.report.charts import alpha_curves
from tests.support.report_data import figure, make_data, quality_table, strategy
from tests.support.report_page import render


def test_charts_are_described_in_words(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert page.tags.count("figure") == 5
    assert "Win rates against mle: cpo, greedy 0.60 (0.50 to 0.70)." in page.text
    assert "All trainings. cpo-run: loss from 2.5 at step 1 to 2 at step 2; cpo-run: reward margin from 0" in page.text
    assert "Scores of the negatives in the ranking: autoregressive 4 negatives, median 0.50." in page.text
    assert "Length of the negatives relative to their targets: autoregressive 4 negatives, median 0.75." in page.text
    assert "Candidates of a group: 4 groups, K 2.25 on average; 1 of them have no negative (K = 1)." in page.text


def test_unranked_negatives_have_no_chart_of_similarities(tmp_path: Path) -> None:
    unranked = strategy("batch", similarity_histogram=None, similarity=None, similarity_p50=None)
    _, page = render(tmp_path, make_data(quality=quality_table(unranked)))
    assert page.tags.count("figure") == 4
    assert "Scores of the negatives" not in page.text


def test_ensembles_are_shown_as_curves_over_their_weights(tmp_path: Path) -> None:
    figures = [figure(f"both@{alpha:g}", "greedy", "similarity win rate", rate)
               for alpha, rate in ((0, 0.25), (0.5, 0.625), (1, 0.5))]  # fmt: skip
    figures += [figure("cpo", "greedy", "similarity win rate", 0.5), figure("both@1", "greedy", "MAUVE", 0.75, False),
                figure("both@1", "greedy", "MAUVE sd", 0.125, False)]  # fmt: skip
    members = [(0.0, "both@0"), (0.5, "both@0.5"), (1.0, "both@1")]
    metrics = pa.Table.from_pylist(figures, schema=METRICS)
    _, page = render(tmp_path, make_data(metrics=metrics, ensembles={"both": members}))
    rates = "0.25 (0.15 to 0.35) at 0, 0.63 (0.53 to 0.73) at 0.5, 0.50 (0.40 to 0.60) at 1"
    assert f"similarity win rate † of ensembles against α. both, greedy: {rates}." in page.text
    assert "both, greedy: 0.75 (0.63 to 0.88) at 1." in page.text, "MAUVE with its standard deviation"
    assert "Win rates against mle: cpo, greedy 0.50 (0.40 to 0.60)." in page.text, "members are in the curves"


def test_curves_differ_by_more_than_colour() -> None:
    chart = alpha_curves(
        "t", [("one", [(0.0, 0.1, None, None)]), ("<two>", [(0.0, 0.2, 0.1, 0.3), (1.0, 0.3, None, None)])]
    )
    assert "&lt;two&gt;" in chart.svg
    assert "stroke-dasharray" in chart.svg
    assert "var(--text, #000000)" in chart.svg, "black where no page defines its colour of text"
    assert "#000000" not in chart.svg.replace("var(--text, #000000)", "")
    assert chart.text == "t against α. one: 0.10 at 0; <two>: 0.20 (0.10 to 0.30) at 0, 0.30 at 1."


def test_win_rates_have_a_panel_per_decoding(tmp_path: Path) -> None:
    figures = [figure("cpo", decoding, "j win rate", 0.5) for decoding in ("greedy", "top-k")]
    figures.append(figure("cpo", "greedy", "j win rate against rival", 0.25))
    _, page = render(tmp_path, make_data(metrics=pa.Table.from_pylist(figures, schema=METRICS)))
    assert "Win rates against mle: cpo, greedy 0.50 (0.40 to 0.60); cpo, top-k 0.50 (0.40 to 0.60)." in page.text
    assert "Win rates against rival: cpo, greedy 0.25 (0.15 to 0.35)." in page.text
