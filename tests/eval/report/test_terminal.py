"""Figures in the terminal."""

import pyarrow as pa
import pytest

from cpo_pipe.data.schemas import METRICS
from cpo_pipe.eval.report.data import ReportData
from cpo_pipe.eval.report.leaderboard import Leaderboard, leaderboards
from cpo_pipe.eval.report.tables import SHARED_NOTE
from cpo_pipe.eval.report.terminal import print_leaderboards, print_quality
from tests.support.report_data import figure, make_data, quality_table, strategy


def shown(capsys: pytest.CaptureFixture[str], data: ReportData) -> list[str]:
    print_leaderboards(boards(data), data.baseline, data.notes)
    return capsys.readouterr().out.splitlines()


def boards(data: ReportData) -> list[Leaderboard]:
    ranked_by = ("similarity win rate", "greedy")
    return leaderboards(data.metrics, data.comparisons, data.baseline, ranked_by, data.shared_metrics)


def test_the_terminal_shows_the_figures_that_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = shown(capsys, make_data())
    assert lines[0] == "greedy, mle is the baseline".ljust(len(lines[0]))
    (cpo,) = (line.split() for line in lines if line.startswith(" cpo"))
    assert cpo == ["cpo", "60%", "[50,", "70]", "0.750", "0.250", "–"]
    names = [line.split()[0] for line in lines if line.startswith(" ") and line.split()]
    assert names[-3:] == ["cpo", "mle", "ground-truth"]
    assert lines[-2:] == ["a note", SHARED_NOTE]


def test_metrics_that_do_not_fit_the_screen_are_left_to_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"a-judge-with-a-long-name": 0.7, "another-judge-with-a-name": 0.6, "a-third-judge-with-a-name": 0.5}
    data = make_data()
    rows = [figure("cpo", "greedy", f"{name} win rate", value) for name, value in names.items()]
    more = pa.concat_tables([data.metrics, pa.Table.from_pylist(rows, schema=METRICS)])
    for columns in ("30", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = shown(capsys, make_data(metrics=more, notes=[]))[:-1]
        assert max(map(len, lines)) <= max(80, int(columns))
        text = "\n".join(lines)
        assert "…" not in text
        assert "60% [50, 70]" in text, "the metric that ranks is always there"
        assert ("third" in text) == (columns == "200")
        assert all(word in text for word in ("similarity", "win rate", "ground-truth"))


def test_the_terminal_shows_the_quality_of_negatives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_quality(quality_table(strategy("batch"), strategy("a-name")), ["a note"])
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if "batch" in line)
    assert head.split() == ["batch", "a-name", "all", "targets"]
    assert ["made", "1,200", "1,200", "1,200", "3"] in [line.split() for line in lines]
    assert lines[-1] == "a note"
    assert not any("…" in line for line in lines)
