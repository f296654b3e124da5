import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpo_pipe.data.recipe import GROUND_TRUTH
from cpo_pipe.data.schemas import EXAMPLES, GROUPS, METRICS
from cpo_pipe.eval.report import MAX_EXAMPLES, ReportData, print_quality, print_table, shows, visible, write_report
from cpo_pipe.pipeline.quality import QUALITY

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'> {{ 7 * 7 }} \x1b[31m\x00 \u202egnihtemos $x$"


def example(number: int, text: str = "") -> dict[str, Any]:
    return {"example_id": f"e{number}", "split": "test", "prompt": f"prompt {number}",
            "rendered": f"prompt {number} {text}", "target": f"target {number} {text}", "prompt_ids": [1],
            "target_ids": [2], "ends": True, "category": None}  # fmt: skip


def figure(system: str, decoding: str, metric: str, value: float, interval: bool = True) -> dict[str, Any]:
    low, high = (value - 0.1, value + 0.1) if interval else (None, None)
    return {"system": system, "decoding": decoding, "metric": metric, "value": value, "ci_low": low, "ci_high": high,
            "n": 7}  # fmt: skip


def group(example_id: str, text: str = "") -> dict[str, Any]:
    def candidate(name: str, strategy: str, similarity: float | None, rank: int) -> dict[str, Any]:
        return {"candidate_id": name, "text": f"{name} {text}", "token_ids": [1], "strategy": strategy,
                "similarity": similarity, "rank": rank}  # fmt: skip

    candidates = [
        candidate("gold", "target", 1.0, 0),
        candidate("farther", "autoregressive", 0.25, 2),
        candidate("nearer", "autoregressive", 0.5, 1),
    ]
    return {"example_id": example_id, "prompt_ids": [1], "candidates": candidates}


def bins(*counts: int) -> list[dict[str, Any]]:
    """A histogram of bins of a quarter."""
    return [{"low": n / 4, "high": (n + 1) / 4, "count": count} for n, count in enumerate(counts, 1)]


def strategy(name: str, **figures: Any) -> dict[str, Any]:
    """Figures of a strategy's negatives; without reference log-probs."""
    measured = {"made": 1200, "kept": 4, "copies": 0.25, "alone": 0.0, "tokens": 12.5, "length_ratio": 0.75,
                "longer": 0.5, "longest": 0.625, "chance": 0.5, "similarity": 0.5, "similarity_p10": 0.125,
                "similarity_p50": 0.5, "similarity_p90": 0.75, "distinct_2": 0.25, "target_distinct_2": 0.5,
                "group_sizes": [1, 2, 0, 1], "length_ratio_histogram": bins(3, 0, 1),
                "similarity_histogram": bins(0, 4)}  # fmt: skip
    return {"strategy": name, **measured, **figures}


def quality_table(*strategies: dict[str, Any]) -> pa.Table:
    target = {"strategy": "target", "made": 3, "kept": 3, "tokens": 20.0, "distinct_2": 0.5}
    return pa.Table.from_pylist([*strategies, strategy("all"), target], schema=QUALITY)


def make_data(text: str = "", count: int = 3, **changes: Any) -> ReportData:
    metrics = [
        figure(GROUND_TRUTH, "-", "rep-4", 0.1),
        figure("mle", "-", "target NLL", 4.125),
        figure("mle", "greedy", "rep-4", 0.5),
        figure("cpo", "greedy", "rep-4", 0.25),
        figure("cpo", "greedy", "MAUVE", 0.75, interval=False),
        figure("cpo", "greedy", "MAUVE sd", 0.015, interval=False),
        figure("cpo", "greedy", "similarity win rate", 0.6),
    ]
    outputs = [
        {"example_id": f"e{number}", "system": system, "decoding": "greedy", "text": f"{system} says {text}"}
        for system in ("mle", "cpo")
        for number in range(count)
    ]
    steps = {"step": [1, 2, 3], "loss": [2.5, 2.0, None], "margin": [0.0, 0.1, 0.3], "learning_rate": [1e-5] * 3}
    settings: dict[str, Any] = {
        "identity": "i1", "run": "a-run",
        "created": "2026-11-20 15:00", "versions": {"cpo-pipe": "0.1.0"}, "recipe": f"name: {text}",
        "artifacts": {"examples": "examples/abc"}, "baseline": "mle",
        "metrics": pa.Table.from_pylist(metrics, schema=METRICS),
        "shared_metrics": {"MAUVE", "similarity win rate"}, "notes": ["a note"],
        "examples": pa.Table.from_pylist([example(number, text) for number in range(count)], schema=EXAMPLES),
        "outputs": pa.Table.from_pylist(outputs), "trainings": {"cpo-run": pa.table(steps)},
        "quality": quality_table(strategy("autoregressive")), "quality_notes": ["autoregressive: too short."],
        "group_examples": pa.Table.from_pylist([example(100, text)], schema=EXAMPLES),
        "groups": pa.Table.from_pylist([group("e100", text)], schema=GROUPS),
    }  # fmt: skip
    return ReportData(**{**settings, **changes})


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def render(tmp_path: Path, data: ReportData) -> tuple[str, Page]:
    write_report(tmp_path / "report.html", data)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_text_of_models_stays_text(tmp_path: Path) -> None:
    html, page = render(tmp_path, make_data(HOSTILE))
    _, harmless = render(tmp_path, make_data("harmless"))
    assert page.tags == harmless.tags
    assert page.tags.count("script") == 1
    assert "<script>alert(1)</script>" not in html
    assert page.text.count("<script>alert(1)</script>") >= 10  # prompt, target, outputs, negatives, recipe
    assert "{{ 7 * 7 }}" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_control_and_direction_characters_are_shown_by_name(tmp_path: Path) -> None:
    html, _ = render(tmp_path, make_data(HOSTILE))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", html)
    assert visible("a\x1b[31m\u202eb\r\nc\td\r\ud800") == "a\\x1b[31m\\u202eb\nc\td\\r\\ud800"


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html, page = render(tmp_path, make_data())
    assert "http://" not in html
    assert "https://" not in html
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert all(value is not None and value.startswith("#") for value in addresses)
    assert "url(" not in re.sub(r"url\(#", "", html)


def test_the_policy_lets_only_the_pages_own_script_run(tmp_path: Path) -> None:
    import base64
    import hashlib

    html, _ = render(tmp_path, make_data(HOSTILE))
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in html


def test_no_id_stands_twice(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if value and name in ("href", "xlink:href")}
    assert used <= set(ids)


def test_the_figures_are_shown_with_their_intervals(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "0.250 [0.150, 0.350]" in page.text
    assert "0.750 ± 0.015" in page.text
    assert "4.125 [4.025, 4.225]" in page.text
    assert "mle (baseline)" in page.text
    assert "a note" in page.text
    assert "MAUVE sd" not in page.text


def test_metrics_of_the_rankers_model_are_marked(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "MAUVE †" in page.text
    assert "rep-4 †" not in page.text
    assert "† Measured with the same embedding model" in page.text
    _, page = render(tmp_path, make_data(shared_metrics=frozenset()))
    assert "†" not in page.text


def test_negatives_stand_in_the_order_of_their_rank(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert page.text.index("cosine 0.500nearer") < page.text.index("cosine 0.250farther")
    assert "autoregressive, cosine 0.500" in page.text
    assert "gold" not in page.text  # the target is shown as the target


def test_charts_say_in_words_what_they_show(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert page.tags.count("svg") == 5
    assert "Win rates against mle: cpo, greedy 0.60 (0.50 to 0.70)." in page.text
    assert "Training of cpo-run: loss from 2.5 at step 1 to 2 at step 2; reward margin from 0" in page.text
    assert "Similarity of the negatives to their targets: autoregressive 4 negatives, median 0.50." in page.text
    assert "Length of the negatives by their targets': autoregressive 4 negatives, median 0.75." in page.text
    assert "Candidates of a group: 4 groups, K 2.25 on average; 1 of them have no negative (K = 1)." in page.text


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    data = make_data(trainings={"a": pa.table({"other": [1]})}, quality=None, quality_notes=[], groups=None,
                     group_examples=None)  # fmt: skip
    _, page = render(tmp_path, data)
    assert page.tags.count("svg") == 1
    assert "There are no groups to measure." in page.text
    assert "Training" not in page.text


def row_of(page: Page, figure: str) -> str:
    """What stands behind a figure's name in the table."""
    return page.text.split(f"\n{figure}")[1].split("\n")[0]


def test_the_quality_of_negatives_is_shown_with_what_it_is_compared_with(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert row_of(page, "made") == "1,2003"
    assert row_of(page, "copies of the target") == "25.0%–"
    assert row_of(page, "the longest is right (chance)") == "62% (50%)–"
    assert row_of(page, "distinct-2 (the targets')") == "0.25 (0.50)0.50"
    assert row_of(page, "cosine, quantiles 10/50/90%") == "0.12/0.50/0.75–"
    assert "autoregressive: too short." in page.text
    assert "likelier" not in page.text, "what was not measured"
    assert "share of those made that equal the target, token by token" in page.text
    assert "different 2-grams by all 2-grams of one negative a group; different 2-grams by" in page.text


def test_strategies_together_are_shown_where_there_are_several(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "figureautoregressivetargets" in page.text
    several = quality_table(strategy("batch"), strategy("pool:x", similarity_histogram=None, similarity_p50=None))
    _, page = render(tmp_path, make_data(quality=several))
    assert "figurebatchpool:xalltargets" in page.text
    assert "Similarity of the negatives to their targets: batch 4 negatives, median 0.50. Shares" in page.text
    assert "by their targets': batch 4 negatives, median 0.75; pool:x 4 negatives, median 0.75." in page.text


def test_unranked_negatives_have_no_chart_of_similarities(tmp_path: Path) -> None:
    unranked = strategy("batch", similarity_histogram=None, similarity=None, similarity_p50=None)
    _, page = render(tmp_path, make_data(quality=quality_table(unranked)))
    assert page.tags.count("svg") == 4
    assert "Similarity of the negatives" not in page.text


def test_labels_and_warnings_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = quality_table(strategy(HOSTILE))
    html, page = render(tmp_path, make_data(quality=table, quality_notes=[HOSTILE]))
    _, harmless = render(tmp_path, make_data())
    assert page.tags == harmless.tags
    assert "<script>alert(1)</script>" not in html
    assert page.text.count("<script>alert(1)</script>") >= 5  # note, table, panels and captions of two charts
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", html)
    print_quality(table, ["[bold]not markup[/bold]"])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[bold]not markup[/bold]" in shown


def test_no_more_examples_are_shown_than_fit(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data(count=MAX_EXAMPLES + 10, groups=None, group_examples=None))
    assert [value for name, value in page.attributes if name == "class"].count("card") == MAX_EXAMPLES
    assert f"the first {MAX_EXAMPLES} of {MAX_EXAMPLES + 10}" in page.text


def test_the_same_data_give_the_same_page(tmp_path: Path) -> None:
    assert render(tmp_path, make_data())[0] == render(tmp_path, make_data())[0]


def test_the_terminal_shows_the_same_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    data = make_data()
    print_table(data.metrics, "mle", data.shared_metrics, data.notes)
    shown = capsys.readouterr().out
    assert "against mle" in shown
    assert "0.250" in shown
    assert "± 0.015" in shown
    assert "MAUVE †" in shown
    assert "† Measured with the same" in shown
    assert "a note" in shown


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
    print_quality(quality_table(strategy("batch"), strategy("pool:a-name")), ["a note"])
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if "batch" in line)
    assert head.split() == ["batch", "pool:a-name", "all", "targets"]
    assert ["made", "1,200", "1,200", "1,200", "3"] in [line.split() for line in lines]
    assert lines[-1] == "a note"
    assert not any("…" in line for line in lines)


def test_a_report_is_drawn_again_only_for_another_identity(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert not shows(path, "i1")
    write_report(path, make_data())
    assert shows(path, "i1")
    assert not shows(path, "i2")
