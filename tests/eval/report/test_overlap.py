from pathlib import Path

import pytest

from cpo_pipe.eval.report.terminal import print_leakage
from tests.support.report_data import HOSTILE, make_data
from tests.support.report_page import render

LEAKED = {"split": "test", "part": "prompt", "examples": 1319, "equal": 0, "near_duplicates": 2, "ngrams": 131,
          "n": 13, "short": 4, "example": f"a:1 (near-duplicate: {HOSTILE})"}  # fmt: skip


def test_the_overlap_with_training_examples_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, _ = render(tmp_path, make_data(leakage=[LEAKED, {**LEAKED, "part": "target", "ngrams": 1}]))
    assert "0 (0.0%)</td><td>2 (0.2%)</td><td>131 (9.9%)</td><td>13</td><td>4</td>" in html
    assert html.count("overlap with training examples (") == 1, "too few targets for a warning"
    assert "133 of 1,319 prompts of the test split overlap" in html
    assert "<script>alert" not in html
    html, _ = render(tmp_path, make_data())
    assert "Overlap with training" not in html
    print_leakage([LEAKED])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "test prompts" in line] == [
        ["test", "prompts", "1,319", "0", "(0.0%)", "2", "(0.2%)", "131", "(9.9%)", "13", "4"]
    ]
    print_leakage([])
    assert capsys.readouterr().out == ""
