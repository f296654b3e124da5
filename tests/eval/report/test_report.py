import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cpo_pipe.data.schemas import EXAMPLES, METRICS
from cpo_pipe.data.text import visible
from cpo_pipe.eval.config import Published
from cpo_pipe.eval.judging import VERDICTS
from cpo_pipe.eval.metrics.wins import COMPARISONS
from cpo_pipe.eval.report.charts import alpha_curves
from cpo_pipe.eval.report.data import ReportData, StageRecord
from cpo_pipe.eval.report.exports import write_exports
from cpo_pipe.eval.report.report import write_report
from cpo_pipe.eval.report.terminal import print_leakage, print_quality, print_table
from cpo_pipe.eval.statistics.agreement import AGREEMENT
from tests.support import hostile as control
from tests.support.report_data import HOSTILE, example, figure, make_data, quality_table, said, strategy, verdict


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


def unpacked(html: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the page's script gets: the names of columns and comparisons, and the examples."""
    packed = re.search(r'<script type="application/gzip"[^>]*>(.*?)</script>', html)
    assert packed is not None
    head, *examples = gzip.decompress(base64.b64decode(packed[1], validate=True)).decode().splitlines()
    return json.loads(head), [json.loads(line) for line in examples]


def test_text_of_models_stays_text(tmp_path: Path) -> None:
    html, page = render(tmp_path, make_data(HOSTILE))
    _, harmless = render(tmp_path, make_data("harmless"))
    assert page.tags == harmless.tags
    assert page.tags.count("script") == 2
    assert "<script>alert(1)</script>" not in html
    assert page.text.count("<script>alert(1)</script>") == 6  # of a group, whose prompt stands twice, and recipe
    assert "{{ 7 * 7 }}" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_control_and_direction_characters_are_shown_by_name(tmp_path: Path) -> None:
    html, _ = render(tmp_path, make_data(HOSTILE))
    hidden = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]")
    assert not hidden.search(html)
    _, examples = unpacked(html)
    assert not hidden.search("".join([*examples[0]["outputs"], examples[0]["prompt"], examples[0]["target"]]))
    assert "\\x1b[31m\\x00 \\u202egnihtemos" in examples[0]["outputs"][0]
    assert visible("a\x1b[31m\u202eb\r\nc\td\r\ud800") == "a\\x1b[31m\\u202eb\nc\td\\r\\ud800"
    assert visible("\u200b\u2066\ufeff\u061c\u2028") == "\\u200b\\u2066\\ufeff\\u061c\\u2028"
    assert visible("a\xadb\u206a\u206f") == "a\\xadb\\u206a\\u206f"
    assert visible("\ufff9\ufffa\ufffb\ufffc") == "\\ufff9\\ufffa\\ufffb\ufffc"
    assert visible("\U000e0000\U000e0041\U000e007f") == "\\U000e0000\\U000e0041\\U000e007f"
    assert visible("é 語 👩\u200d💻") == "é 語 👩\u200d💻"


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html, page = render(tmp_path, make_data())
    assert "http://" not in html
    assert "https://" not in html
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert all(value is not None and value.startswith("#") for value in addresses)
    assert "url(" not in re.sub(r"url\(#", "", html)


def test_the_policy_lets_only_the_pages_own_script_run(tmp_path: Path) -> None:
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


def test_differences_between_systems_are_shown_judge_by_judge(tmp_path: Path) -> None:
    pair = {"metric": "similarity win rate", "decoding": "greedy", "system_a": "cpo", "system_b": "mle",
            "difference": 0.1, "ci_low": 0.0125, "ci_high": 0.2, "p": 0.02, "p_holm": 0.04, "n": 7,
            "n_needed": 1785}  # fmt: skip
    alone = pair | {"metric": "exact win rate", "difference": -0.25, "ci_low": None, "ci_high": None, "p": 1e-9}
    table = pa.Table.from_pylist([pair, alone], schema=COMPARISONS)
    _, page = render(tmp_path, make_data(comparisons=table))
    assert row_of(page, "cpo against mle, greedy") == "+0.100 [+0.013, +0.200]0.0200.0401,785"
    assert "-0.250< 0.0010.0401,785" in page.text
    similarity, exact = page.text.index("\nsimilarity win rate †\n"), page.text.index("\nexact win rate\n")
    assert similarity < page.text.index("+0.100") < exact < page.text.index("-0.250")
    _, page = render(tmp_path, make_data())
    assert "Differences between systems" not in page.text


def test_how_far_judges_agree_is_shown_and_written(tmp_path: Path) -> None:
    row = {"judge_a": "gpt", "judge_b": "human annotations", "agreement": 0.8125, "ci_low": 0.7, "ci_high": 0.9,
           "kappa": 0.5, "kappa_low": 0.25, "kappa_high": 0.75, "n": 1600}  # fmt: skip
    alike = row | {"judge_b": "longer", "kappa": None, "kappa_low": None, "kappa_high": None}
    data = make_data(agreements=pa.Table.from_pylist([row, alike], schema=AGREEMENT))
    _, page = render(tmp_path, data)
    assert row_of(page, "gpt and human annotations") == "0.812 [0.700, 0.900]0.500 [0.250, 0.750]1,600"
    assert row_of(page, "gpt and longer") == "0.812 [0.700, 0.900]–1,600"
    write_exports(tmp_path, data)
    assert (
        "| gpt and human annotations | 0.812 [0.700, 0.900] | 0.500 [0.250, 0.750] | 1,600 |"
        in (tmp_path / "metrics.md").read_text()
    )
    _, page = render(tmp_path, make_data())
    assert "Agreement of judges" not in page.text


def test_foreign_text_in_the_figures_to_paste(tmp_path: Path) -> None:
    hostile = f"{control.HOSTILE} | <b>x</b> [y](http://z) `c`"
    published = Published(source=hostile, metric="chrF", decoding="greedy", values={hostile: 0.5})
    data = make_data(published=[published], notes=[f"# {hostile}\n\n| --- |"])
    write_exports(tmp_path, data)
    text = (tmp_path / "metrics.md").read_text()
    assert not control.RAW.search(text)
    shown = control.SHOWN.replace(r"\re", " e").replace("\\", r"\\")
    cell = rf"{shown} \| &lt;b>x&lt;/b> [y\](http://z) \`c\`"
    assert f"\n{cell}: chrF, greedy\n" in text
    assert f"\n| {cell} | 0.500 | – |\n" in text
    assert rf"{chr(10)}\# {cell} \| --- \|{chr(10)}" in text
    html, _ = render(tmp_path, data)
    assert not control.RAW.search(html)


def test_published_figures_stand_beside_the_runs(tmp_path: Path) -> None:
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


def test_metrics_of_the_rankers_model_are_marked(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "MAUVE †" in page.text
    assert "rep-4 †" not in page.text
    assert "† Measured with the embedding model that ranked" in page.text
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
    assert "Scores of the negatives in the ranking: autoregressive 4 negatives, median 0.50." in page.text
    assert "Length of the negatives relative to their targets: autoregressive 4 negatives, median 0.75." in page.text
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
    assert row_of(page, "target is longest (chance)") == "62% (50%)–"
    assert row_of(page, "distinct-2 (the targets')") == "0.25 (0.50)0.50"
    assert row_of(page, "score, quantiles 10/50/90%") == "0.12/0.50/0.75–"
    assert "autoregressive: too short." in page.text
    assert "log-prob" not in page.text, "what was not measured"
    assert "share of those made that equal the target, token by token" in page.text
    assert "distinct 2-grams divided by all 2-grams of one negative per group; distinct 2-grams" in page.text


def test_strategies_together_are_shown_where_there_are_several(tmp_path: Path) -> None:
    _, page = render(tmp_path, make_data())
    assert "figureautoregressivetargets" in page.text
    several = quality_table(strategy("batch"), strategy("x", similarity_histogram=None, similarity_p50=None))
    _, page = render(tmp_path, make_data(quality=several))
    assert "figurebatchxalltargets" in page.text
    assert "Scores of the negatives in the ranking: batch 4 negatives, median 0.50. Shares" in page.text
    assert "relative to their targets: batch 4 negatives, median 0.75; x 4 negatives, median 0.75." in page.text


def test_unranked_negatives_have_no_chart_of_similarities(tmp_path: Path) -> None:
    unranked = strategy("batch", similarity_histogram=None, similarity=None, similarity_p50=None)
    _, page = render(tmp_path, make_data(quality=quality_table(unranked)))
    assert page.tags.count("svg") == 4
    assert "Scores of the negatives" not in page.text


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


def test_the_page_carries_all_examples_with_outputs_and_verdicts(tmp_path: Path) -> None:
    scores = said("ab", "a", '{"a": 0.81234567, "b": true}')
    answers = said("ab", "a", '{"answer": "A"}'), said("ba", "b", '{"answer": "A"}', p_a=0.25)
    verdicts = [
        verdict(0, "a", scores),
        verdict(0, "tie", *answers, judge="api"),
        verdict(2, "tie"),  # equal outputs
    ]
    html, _ = render(tmp_path, make_data(count=3, verdicts=pa.Table.from_pylist(verdicts, schema=VERDICTS)))
    head, examples = unpacked(html)
    assert head["columns"] == [["mle", "greedy"], ["cpo", "greedy"]]
    assert head["comparisons"] == [
        {"judge": judge, "system": "cpo", "decoding": "greedy", "opponent": "mle"} for judge in ("similarity", "api")
    ]
    assert [example["id"] for example in examples] == ["e0", "e1", "e2"]
    assert examples[1]["outputs"] == ["mle says ", "cpo says "]
    assert examples[1]["verdicts"] == [None, None]
    assert examples[0]["verdicts"] == [
        {"winner": "a", "orders": [{"order": "ab", "winner": "a", "said": "cpo: 0.8123; mle: yes"}]},
        {
            "winner": "tie",
            "orders": [
                {"order": "ab", "winner": "a", "said": "answer: A"},
                {"order": "ba", "winner": "b", "said": "answer: A; P(cpo is better): 0.25"},
            ],
        },
    ]
    assert examples[2]["verdicts"] == [{"winner": "tie", "orders": []}, None]


def test_examples_that_would_make_the_page_too_large_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpo_pipe.eval.report.examples.MAX_PACKED", 300_000)
    noise = np.random.default_rng(0).integers(0, 256, (40, 20_000), np.uint8)
    outputs = [
        {"example_id": f"e{number}", "system": "mle", "decoding": "greedy", "text": row.tobytes().hex()}
        for number, row in enumerate(noise)
    ]
    html, page = render(tmp_path, make_data(count=40, outputs=pa.Table.from_pylist(outputs)))
    _, examples = unpacked(html)
    assert 13 <= len(examples) <= 20, "20,000 bytes each, of 300,000 and what the compression holds back"
    assert examples[-1]["outputs"] == [outputs[len(examples) - 1]["text"]]
    assert f"The first {len(examples)} of 40 held-out prompts" in page.text


def test_ensembles_are_curves_over_their_weights(tmp_path: Path) -> None:
    figures = [figure(f"both@{alpha:g}", "greedy", "similarity win rate", rate)
               for alpha, rate in ((0, 0.25), (0.5, 0.625), (1, 0.5))]  # fmt: skip
    figures += [figure("cpo", "greedy", "similarity win rate", 0.5), figure("both@1", "greedy", "MAUVE", 0.75, False),
                figure("both@1", "greedy", "MAUVE sd", 0.125, False)]  # fmt: skip
    members = [(0.0, "both@0"), (0.5, "both@0.5"), (1.0, "both@1")]
    metrics = pa.Table.from_pylist(figures, schema=METRICS)
    _, page = render(tmp_path, make_data(metrics=metrics, ensembles={"both": members}))
    rates = "0.25 (0.15 to 0.35) at 0, 0.62 (0.53 to 0.72) at 0.5, 0.50 (0.40 to 0.60) at 1"
    assert f"similarity win rate † of ensembles against α. both, greedy: {rates}." in page.text
    assert "both, greedy: 0.75 (0.62 to 0.88) at 1." in page.text, "MAUVE with its spread"
    assert "Win rates against mle: cpo, greedy 0.50 (0.40 to 0.60)." in page.text, "members are in the curves"


def test_curves_are_told_apart_by_more_than_colour() -> None:
    chart = alpha_curves(
        "t", [("one", [(0.0, 0.1, None, None)]), ("<two>", [(0.0, 0.2, 0.1, 0.3), (1.0, 0.3, None, None)])]
    )
    assert "&lt;two&gt;" in chart.svg
    assert "stroke-dasharray" in chart.svg
    assert chart.text == "t against α. one: 0.10 at 0; <two>: 0.20 (0.10 to 0.30) at 0, 0.30 at 1."


def test_win_rates_have_a_panel_per_decoding(tmp_path: Path) -> None:
    figures = [figure("cpo", decoding, "j win rate", 0.5) for decoding in ("greedy", "top-k")]
    figures.append(figure("cpo", "greedy", "j win rate against rival", 0.25))
    _, page = render(tmp_path, make_data(metrics=pa.Table.from_pylist(figures, schema=METRICS)))
    assert "Win rates against mle: cpo, greedy 0.50 (0.40 to 0.60); cpo, top-k 0.50 (0.40 to 0.60)." in page.text
    assert "Win rates against rival: cpo, greedy 0.25 (0.15 to 0.35)." in page.text


def test_time_and_cost_of_the_stages_are_shown(tmp_path: Path) -> None:
    stages = [
        StageRecord(name="prepare", seconds=0.25, total_seconds=59.4, spent=""),
        StageRecord(name="train cpo", seconds=61, total_seconds=7380, spent="mini: 12 prompt tokens"),
    ]
    _, page = render(tmp_path, make_data(stages=stages))
    assert row_of(page, "prepare") == "0.2 s59.4 s–"
    assert row_of(page, "train cpo") == "1 min 1 s2 h 3 minmini: 12 prompt tokens"


def test_the_figures_are_also_markdown(tmp_path: Path) -> None:
    write_exports(tmp_path, make_data())
    lines = (tmp_path / "metrics.md").read_text().splitlines()
    assert "a note" in lines, "what the figures need said beside them is pasted with them"
    assert any(line.startswith("† Measured with the embedding model") for line in lines)
    assert "| metric | ground-truth | mle (baseline) | cpo |" in lines
    assert "| --- | ---: | ---: | ---: |" in lines
    assert "| MAUVE † | – | – | 0.750 ± 0.015 |" in lines


def test_outputs_are_written_as_alpaca_eval_reads_them(tmp_path: Path) -> None:
    examples = pa.Table.from_pylist([example(0), {**example(1), "category": "qa"}], schema=EXAMPLES)
    outputs = [{"example_id": name, "system": "ens@0.5", "decoding": "top-p", "text": f"{HOSTILE} {name}"}
               for name in ("e1", "e0")]  # fmt: skip
    write_exports(tmp_path, make_data(examples=examples, outputs=pa.Table.from_pylist(outputs)))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert files == ["model_outputs/ens@0.5/top-p.json", "model_outputs/ground-truth/targets.json"]
    assert json.loads((tmp_path / files[0]).read_text()) == [
        {"instruction": f"prompt {number}", "output": f"{HOSTILE} e{number}", "generator": "ens@0.5/top-p",
         "dataset": dataset} for number, dataset in enumerate(("a-run", "qa"))
    ]  # fmt: skip
    target = json.loads((tmp_path / files[1]).read_text())[0]
    assert (target["output"], target["generator"]) == ("target 0 ", "ground-truth")


def test_outputs_of_what_a_run_no_longer_has_do_not_stay(tmp_path: Path) -> None:
    def outputs(*columns: tuple[str, str]) -> pa.Table:
        return pa.Table.from_pylist([
            {"example_id": name, "system": system, "decoding": decoding, "text": f"{system} {decoding}"}
            for system, decoding in columns for name in ("e0", "e1")
        ])  # fmt: skip

    examples = pa.Table.from_pylist([example(0), example(1)], schema=EXAMPLES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.json").write_text("mine")
    write_exports(
        tmp_path, make_data(examples=examples, outputs=outputs(("old", "greedy"), ("cpo", "a"), ("cpo", "b")))
    )
    # What the user, or AlpacaEval beside its input, keeps there stays.
    own = {"old/annotations.json": '[{"generator_1": "old/greedy"}]', "gpt4/outputs.json": '[{"generator": "gpt4"}]',
           "gpt4/empty.json": "[]", "gpt4/labels.json": "none of ours"}  # fmt: skip
    for name, content in own.items():
        (tmp_path / "model_outputs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model_outputs" / name).write_text(content)
    # Also a system that is called as a file of the targets might be
    new = outputs(("cpo", "b"), ("ground-truth.json", "greedy"), ("targets.json", "greedy"))
    write_exports(tmp_path, make_data(examples=examples, outputs=new))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "metrics.md",
        "mine/note.json",
        "model_outputs/cpo/b.json",
        "model_outputs/gpt4/empty.json",
        "model_outputs/gpt4/labels.json",
        "model_outputs/gpt4/outputs.json",
        "model_outputs/ground-truth.json/greedy.json",
        "model_outputs/ground-truth/targets.json",
        "model_outputs/old/annotations.json",
        "model_outputs/targets.json/greedy.json",
    ]
    assert not [*tmp_path.glob(".tmp-*")]
    assert json.loads((tmp_path / "model_outputs/cpo/b.json").read_text())[0]["output"] == "cpo b"


def test_the_same_data_give_the_same_page(tmp_path: Path) -> None:
    assert render(tmp_path, make_data())[0] == render(tmp_path, make_data())[0]


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


def test_the_terminal_leaves_the_rest_to_the_report(
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
