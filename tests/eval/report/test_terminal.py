"""Figures in the terminal."""

import pyarrow as pa
import pytest

from cpo_pipe.eval.report.terminal import print_quality, print_table
from tests.support.report_data import make_data, quality_table, strategy


def test_the_terminal_shows_the_same_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    data = make_data()
    print_table(data.metrics, "mle", data.shared_metrics, notes=data.notes)
    shown = capsys.readouterr().out
    assert "against mle" in shown
    assert "0.250" in shown
    assert "± 0.015" in shown
    assert "MAUVE †" in shown
    assert "† Measured with the embedding model" in shown
    assert "a note" in shown


def test_the_terminal_omits_secondary_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data = make_data()
    row = {"system": "cpo", "decoding": "greedy", "value": 0.987, "ci_low": None, "ci_high": None, "n": 4}
    left = ["gpt position bias", "gpt flip rate", "likely log-prob", "gpt win rate against mix@0.5", "distinct-3"]
    more = pa.Table.from_pylist([row | {"metric": metric} for metric in left], schema=data.metrics.schema)
    print_table(pa.concat_tables([data.metrics, more]), "mle", data.shared_metrics)
    shown = capsys.readouterr().out
    assert "0.987" not in shown
    assert "99" not in shown


def test_a_narrow_terminal_loses_no_figure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    data = make_data()
    print_table(data.metrics, "mle", data.shared_metrics)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(figure in shown for figure in ("0.500", "0.250", "4.125", "0.750", "± 0.015", "60"))


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
